// Ids: where they live, and what is done with many of them at once.
#pragma once

#include <cstdint>
#include <cstddef>
#include <cstring>
#include <vector>

#include "rows.h"

namespace headwater {

constexpr int kBuckets = 256;

// Two ids never have the same mix. Servers and saved tables depend on it: it must never change.
inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline uint64_t hash_of(int64_t id) { return mix64(static_cast<uint64_t>(id)); }
inline int bucket_of(uint64_t hash) { return static_cast<int>(hash >> 56); }

// A call of memcpy takes as long as copying a short row.
inline void copy_floats(float* to, const float* from, int64_t count) {
  if (count > 64) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) std::memcpy(to + i, from + i, 16);
  for (; i < count; i++) to[i] = from[i];
}

struct Unique {
  std::vector<int64_t> ids;   // grouped by server; within one, in order of first appearance
  std::vector<int64_t> ends;  // of each server's
  std::vector<int32_t> inverse;
};
Unique unique_ids(const int64_t* ids, int64_t count, int servers);

// Returns whether all sums are finite.
bool sum_rows(const RowSum& sum, int threads, const RowLevel& level);
void take_rows(const float* rows, const int32_t* sources, float* out, int64_t count, int64_t dim, int threads);

uint64_t hash_text(const char* text, size_t bytes);

}  // namespace headwater
