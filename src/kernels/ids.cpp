#include "ids.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace headwater {
namespace {

constexpr int64_t kAhead = 16;  // how far ahead of its use memory is asked for

}  // namespace

Unique unique_ids(const int64_t* ids, int64_t count, int servers) {
  int bits = 6;
  while (int64_t{1} << bits < 2 * count) bits++;
  const size_t places = size_t{1} << bits;
  std::vector<int32_t> table(places, -1);  // place → number of the distinct id that hashes there
  // One multiplication: ids come from this process, so nobody has chosen them to meet.
  const auto place_of = [bits](int64_t id) {
    const uint64_t x = static_cast<uint64_t>(id);
    return static_cast<size_t>((x ^ x >> 32) * 0x9e3779b97f4a7c15u >> (64 - bits));
  };

  Unique found;
  found.inverse.resize(static_cast<size_t>(count));
  std::vector<int64_t> distinct(static_cast<size_t>(count));
  int32_t known = 0;
  for (int64_t i = 0; i < count; i++) {
    if (i + kAhead < count) __builtin_prefetch(&table[place_of(ids[i + kAhead])], 1);
    size_t place = place_of(ids[i]);
    while (table[place] >= 0 && distinct[static_cast<size_t>(table[place])] != ids[i]) place = (place + 1) & (places - 1);
    if (table[place] < 0) {
      distinct[static_cast<size_t>(known)] = ids[i];
      table[place] = known++;
    }
    found.inverse[static_cast<size_t>(i)] = table[place];
  }
  distinct.resize(static_cast<size_t>(known));

  found.ends.assign(static_cast<size_t>(servers), 0);
  if (servers == 1) {
    found.ends[0] = static_cast<int64_t>(distinct.size());
    found.ids = std::move(distinct);
    return found;
  }
  const auto server_of = [servers](int64_t id) { return static_cast<size_t>(bucket_of(hash_of(id)) * servers / kBuckets); };
  std::vector<int64_t> next(static_cast<size_t>(servers), 0);
  for (int64_t id : distinct) found.ends[server_of(id)]++;
  for (size_t s = 1; s < next.size(); s++) {
    next[s] = found.ends[s - 1];
    found.ends[s] += found.ends[s - 1];
  }
  found.ids.resize(distinct.size());
  std::vector<int32_t> moved(distinct.size());
  for (size_t i = 0; i < distinct.size(); i++) {
    const int64_t to = next[server_of(distinct[i])]++;
    found.ids[static_cast<size_t>(to)] = distinct[i];
    moved[i] = static_cast<int32_t>(to);
  }
  for (int32_t& i : found.inverse) i = moved[static_cast<size_t>(i)];
  return found;
}

// A thread owns a range of the targets and goes through all of the sources: so every sum has one order.
void sum_rows(const RowSum& sum, int threads, const RowLevel& level) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, sum.count / 4096));
  run_tasks(parts, threads, [&](int64_t part) {
    const int64_t first = sum.targets_limit * part / parts, limit = sum.targets_limit * (part + 1) / parts;
    std::memset(sum.out + first * sum.dim, 0, static_cast<size_t>((limit - first) * sum.dim) * sizeof(float));
    for (int64_t i = 0; i < sum.count; i++) {
      if (i + kAhead < sum.count) {
        __builtin_prefetch(sum.out + sum.targets[i + kAhead] * sum.dim, 1);
        if (sum.sources != nullptr) __builtin_prefetch(sum.rows + sum.sources[i + kAhead] * sum.dim);
      }
      const int64_t target = sum.targets[i];
      if (target < first || target >= limit) continue;
      const float* row = sum.rows + (sum.sources == nullptr ? i : sum.sources[i]) * sum.dim;
      if (sum.weights == nullptr) level.add(sum.out + target * sum.dim, row, sum.dim);
      else level.add_scaled(sum.out + target * sum.dim, row, sum.weights[i], sum.dim);
    }
    return true;
  });
}

void take_rows(const float* rows, const int32_t* sources, float* out, int64_t count, int64_t dim, int threads) {
  constexpr int64_t part = 4096;
  run_tasks((count + part - 1) / part, threads, [&](int64_t p) {
    const int64_t limit = std::min(count, (p + 1) * part);
    for (int64_t i = p * part; i < limit; i++) {
      if (i + kAhead < limit) __builtin_prefetch(rows + sources[i + kAhead] * dim);
      copy_floats(out + i * dim, rows + sources[i] * dim, dim);
    }
    return true;
  });
}

// Eight bytes at a time; the length keeps texts apart that differ in trailing zeros.
uint64_t hash_text(const char* text, size_t bytes) {
  uint64_t hash = mix64(bytes);
  for (size_t at = 0; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text + at, std::min<size_t>(8, bytes - at));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    hash = mix64(hash ^ word);
  }
  return hash;
}

}  // namespace headwater
