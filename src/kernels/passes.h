// The passes over parameters, compiled once per SIMD level (passes.cpp) and chosen while running (levels.cpp).
//
// Plain structs and pointers only: passes.cpp is compiled with instructions that this CPU may lack, so it must not
// instantiate any inline function that the linker could share with the rest of the program.
#pragma once

#include <cstdint>

#include "rows.h"

namespace headwater {

constexpr int64_t kBlock = 16384;  // elements: the unit of hand-out to threads and of square sums
constexpr int64_t kChunk = 1024;   // elements: what stays in the first-level cache between the stages
constexpr int kPlanesMax = 5;      // wire, master and three slots
constexpr int kScalarsMax = 8;

enum class Wire { float32, float64, bfloat16, float16 };
enum class Optimizer { sgd, adagrad, rmsprop, adam, adamw, mean };

// Flags, per optimizer; the same numbers stand in optim.py.
constexpr int kMomentum = 1;  // sgd, rmsprop
constexpr int kNesterov = 2;  // sgd
constexpr int kCentered = 2;  // rmsprop
constexpr int kAmsgrad = 1;   // adam, adamw

struct Run {  // elements [start, stop) share a row of scalars; row -1 is left as it is
  int64_t start;
  int64_t stop;
  int64_t row;
};

struct Commit {
  const Run* runs;
  int64_t run_count;
  const double* scalars;  // (rows, width)
  int64_t width;
  const void* const* contributions;
  int64_t contribution_count;
  const double* coefficients;  // (run_count, contribution_count)
};

struct Pass {
  Wire wire;
  Optimizer optimizer;
  int flags;
  int64_t elements;
  const void* source[kPlanesMax];
  void* target[kPlanesMax];
  int plane_count;
  const Commit* commits;
  int64_t commit_count;
  bool streamed;  // write the targets around the cache
  bool is_checked;  // stop at a contribution that is not finite
};

// One entry per SIMD level. All levels give the same bits.
struct Level {
  const char* name;
  // Applies every commit to one block. False: a contribution holds NaN or infinity, the block is garbage.
  bool (*apply)(const Pass& pass, int64_t block);
  // Returns the sum of squares of the aggregated gradient of one block.
  double (*square_sum)(Wire wire, const Commit& commit, int64_t elements, int64_t block);
  // Writes the aggregated gradient of one block to `out`, of the master dtype: zero where nobody contributes.
  void (*aggregate)(Wire wire, const Commit& commit, int64_t elements, void* out, bool streamed, int64_t block);
  // Returns the first non-finite element of [start, stop), or -1.
  int64_t (*find_non_finite)(Wire wire, const void* values, int64_t start, int64_t stop);
  void (*copy)(void* target, const void* source, int64_t bytes, bool streamed);
  void (*narrow)(Wire wire, void* target, const float* source, int64_t elements);  // round to nearest even
  void (*widen)(Wire wire, float* target, const void* source, int64_t elements);
  const RowLevel* rows;
};

extern const Level level_baseline;
#ifdef HEADWATER_X86_LEVELS
extern const Level level_avx2;
extern const Level level_avx512;
#endif

// Default rounding and denormals kept, whatever the calling thread has set; restored at the end of the scope.
class PlainFloats {
 public:
  PlainFloats();
  ~PlainFloats();
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace headwater
