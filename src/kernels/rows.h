// What is done to one row of a table at a time; compiled once per SIMD level (rows.cpp), all with the same bits.
//
// Plain structs and pointers only, for the reason that passes.h gives.
#pragma once

#include <cstdint>

namespace headwater {

enum class RowRule { sgd, adagrad, rowwise_adagrad, adam, ftrl };
constexpr int kRowScalarsMax = 7;

enum class Initial { constant, uniform, normal };

struct Start {  // how a row begins
  Initial kind;
  float scale;  // normal: already times √1.5 / 2^16
  uint64_t seed;
};

// row: `dim` values and then the optimizer's state, anywhere in memory.
using StepRow = void (*)(const float* scalars, float* row, const float* gradient, int64_t dim);

struct RowSum {
  const float* rows;
  const int32_t* targets;  // count of them
  const int32_t* sources;  // or null: 0, 1, 2, …
  const float* weights;    // or null: 1
  float* out;
  int64_t count, targets_limit, dim;
};

struct RowLevel {
  StepRow step[5];  // by RowRule
  // Writes the initial value of an id; key = mix64(id) with the seed mixed in.
  void (*fill)(const Start& start, uint64_t key, float* out, int64_t dim);
  // Sets the targets from `first` to `limit` (not included) to their sums, in ascending i; returns whether all are finite.
  bool (*sum)(const RowSum& sum, int64_t first, int64_t limit);
};

extern const RowLevel rows_baseline;
#ifdef HEADWATER_X86_LEVELS
extern const RowLevel rows_avx2;
extern const RowLevel rows_avx512;
#endif

}  // namespace headwater
