// The row optimizers and initial values. Compiled once per SIMD level.
//
// The formulas are those of passes.cpp, on rows of a few numbers instead of long planes. A row is taken sixteen elements at a
// time, whatever the level: the compiler splits such a vector into what the level has. Only + − × ÷ and square root, never
// contracted, in a fixed order.

#include "rows.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define HEADWATER_JOIN_(a, b) a##b
#define HEADWATER_JOIN(a, b) HEADWATER_JOIN_(a, b)

namespace headwater {
namespace {

typedef float Floats __attribute__((vector_size(64)));  // sixteen
typedef float Four __attribute__((vector_size(16)));
constexpr int64_t kLanes = 16;

inline float root(float x) { return __builtin_sqrtf(x); }

template <class V>
inline void load(V& to, const float* from) { __builtin_memcpy(&to, from, sizeof to); }
template <class V>
inline void store(float* to, const V& from) { __builtin_memcpy(to, &from, sizeof from); }

inline void root_of(float& to, const float& x) { to = root(x); }
inline void root_of(Floats& to, const Floats& x) {
#if defined(__AVX512F__)
  const __m512 y = _mm512_sqrt_ps(reinterpret_cast<const __m512&>(x));
  to = reinterpret_cast<const Floats&>(y);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = root(lane);
  load(to, lanes);
#endif
}

// from + weight·(to − from), as passes.cpp has it.
template <class V>
inline void lerp(V& result, const V& from, const V& to, float weight) {
  if (weight < 0.5f) result = from + weight * (to - from);
  else result = to - (to - from) * (1.0f - weight);
}

// Each rule: (value, state…) of the element at hand, or of sixteen, from the gradient's.

struct Sgd {
  static constexpr int kStates = 0;
  const float lr, decay;
  explicit Sgd(const float* s) : lr(s[0]), decay(s[1]) {}
  template <class V>
  inline void operator()(const V& g, V& w, V*) const {
    const V d = g + decay * w;
    w = w - lr * d;
  }
};

struct Adagrad {
  static constexpr int kStates = 1;
  const float lr, decay, eps;
  explicit Adagrad(const float* s) : lr(s[0]), decay(s[1]), eps(s[2]) {}
  template <class V>
  inline void operator()(const V& g, V& w, V* state) const {
    const V d = g + decay * w;
    state[0] = state[0] + d * d;
    V spread;
    root_of(spread, state[0]);
    w = w - lr * d / (spread + eps);
  }
};

struct Adam {
  static constexpr int kStates = 2;
  const float step_size, decay, fresh1, beta2, fresh2, correction, eps;
  explicit Adam(const float* s)
      : step_size(s[0]), decay(s[1]), fresh1(s[2]), beta2(s[3]), fresh2(s[4]), correction(s[5]), eps(s[6]) {}
  template <class V>
  inline void operator()(const V& g, V& w, V* state) const {
    const V d = g + decay * w;
    V mean, spread;
    lerp(mean, state[0], d, fresh1);
    state[0] = mean;
    state[1] = beta2 * state[1] + fresh2 * d * d;
    root_of(spread, state[1]);
    w = w - step_size * mean / (spread / correction + eps);
  }
};

// McMahan et al., 2013, algorithm 1: state z, n.
struct Ftrl {
  static constexpr int kStates = 2;
  const float lr, beta, l1, l2;
  explicit Ftrl(const float* s) : lr(s[0]), beta(s[1]), l1(s[2]), l2(s[3]) {}
  template <class V>
  inline void operator()(const V& g, V& w, V* state) const {
    const V n = state[1] + g * g;
    V before, after;
    root_of(before, state[1]);
    root_of(after, n);
    const V z = state[0] + g - (after - before) / lr * w;
    const V zero = z - z;
    const V magnitude = z < zero ? -z : z;
    const V shrunk = z < zero ? z + l1 : z - l1;
    const V moved = -shrunk / ((beta + after) / lr + l2);
    w = magnitude <= l1 + zero ? zero : moved;
    state[0] = z;
    state[1] = n;
  }
};

template <class Rule, class V>
inline void take(const Rule& rule, float* row, const float* gradient, int64_t dim, int64_t i) {
  V g, w, state[Rule::kStates + 1];
  load(g, gradient + i);
  load(w, row + i);
  for (int k = 0; k < Rule::kStates; k++) load(state[k], row + (k + 1) * dim + i);
  rule(g, w, state);
  store(row + i, w);
  for (int k = 0; k < Rule::kStates; k++) store(row + (k + 1) * dim + i, state[k]);
}

template <class Rule>
void step(const float* scalars, float* row, const float* gradient, int64_t dim) {
  const Rule rule(scalars);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) take<Rule, Floats>(rule, row, gradient, dim, i);
  for (; i < dim; i++) take<Rule, float>(rule, row, gradient, dim, i);
}

// Lane i takes lane i + 8, then i + 4, i + 2, i + 1.
inline float sum_of(const Floats& lanes) {
  typedef float Eight __attribute__((vector_size(32)));
  Eight eights[2];
  __builtin_memcpy(eights, &lanes, sizeof lanes);
  eights[0] += eights[1];
  Four fours[2];
  __builtin_memcpy(fours, &eights[0], sizeof fours);
  fours[0] += fours[1];
  return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// One accumulator a row: the mean of the squares. Lane i of sixteen sums the elements i, i + 16, ….
void step_rowwise(const float* s, float* row, const float* gradient, int64_t dim) {
  const float lr = s[0], decay = s[1], eps = s[2];
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    Floats g, w;
    load(g, gradient + i);
    load(w, row + i);
    const Floats d = g + decay * w;
    sums += d * d;
  }
  if (i < dim) {
    float lanes[kLanes];
    store(lanes, sums);
    for (int64_t j = i; j < dim; j++) {
      const float d = gradient[j] + decay * row[j];
      lanes[j - i] += d * d;
    }
    load(sums, lanes);
  }
  row[dim] += sum_of(sums) / static_cast<float>(dim);
  const float scale = root(row[dim]) + eps;
  for (i = 0; i + kLanes <= dim; i += kLanes) {
    Floats g, w;
    load(g, gradient + i);
    load(w, row + i);
    const Floats d = g + decay * w;
    w = w - lr * d / scale;
    store(row + i, w);
  }
  for (; i < dim; i++) {
    const float d = gradient[i] + decay * row[i];
    row[i] = row[i] - lr * d / scale;
  }
}

typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

// 32 bits for position i: both halves of the key go in, with a full mix in between.
template <class W>
inline void draw(W& x, uint64_t key, const W& i) {
  x = static_cast<uint32_t>(key) + i * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x ^= static_cast<uint32_t>(key >> 32) ^ (x >> 16);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x ^= x >> 16;
}

inline void to_floats(float& to, const uint32_t& from) { to = static_cast<float>(static_cast<int32_t>(from)); }
inline void to_floats(Floats& to, const Words& from) { to = __builtin_convertvector((Ints)from, Floats); }

struct Uniform {
  static constexpr uint32_t kDraws = 1;
  template <class W, class F>
  static inline void take(F& value, uint64_t key, const W& i) {
    W x;
    draw(x, key, i);
    to_floats(value, W(x >> 8));
    value = value * 0x1p-23f - 1.0f;
  }
};

// The sum of eight uniform numbers of 16 bits.
struct Normal {
  static constexpr uint32_t kDraws = 4;
  template <class W, class F>
  static inline void take(F& value, uint64_t key, const W& i) {
    W sum = i - i;
    for (uint32_t k = 0; k < kDraws; k++) {
      W x;
      draw(x, key, W(i * kDraws + k));
      sum += (x & 0xffffu) + (x >> 16);
    }
    to_floats(value, sum);
    value = value - 262140.0f;
  }
};

template <class Kind>
void fill_with(float scale, uint64_t key, float* out, int64_t dim) {
  constexpr Words kFirst = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    Floats values;
    Kind::take(values, key, Words(kFirst + static_cast<uint32_t>(i)));
    store(out + i, Floats(values * scale));
  }
  for (; i < dim; i++) {
    Kind::take(out[i], key, static_cast<uint32_t>(i));
    out[i] *= scale;
  }
}

void fill(const Start& start, uint64_t key, float* out, int64_t dim) {
  switch (start.kind) {
    case Initial::constant:
      for (int64_t i = 0; i < dim; i++) out[i] = start.scale;
      return;
    case Initial::uniform: return fill_with<Uniform>(start.scale, key, out, dim);
    case Initial::normal: return fill_with<Normal>(start.scale, key, out, dim);
  }
}

// What is wider than the CPU has goes through memory.
#if defined(__AVX512F__)
constexpr int kWide = 64;
#elif defined(__AVX2__)
constexpr int kWide = 32;
#else
constexpr int kWide = 16;
#endif
typedef float Wide __attribute__((vector_size(kWide)));
typedef int32_t WideBits __attribute__((vector_size(kWide)));
typedef int32_t FourBits __attribute__((vector_size(16)));

// out = (out & seen) + weight·row, without a branch on whether anything is there. What has become NaN or infinite stays so: to look at
// each sum on the way is to look at all of them. largest: of their bits but for the sign.
template <class V, class Bits>
inline void add_to(float* out, int32_t seen, const float* row, float weight, Bits& largest) {
  Bits bits;
  V value, more;
  __builtin_memcpy(&bits, out, sizeof bits);
  bits &= seen;
  __builtin_memcpy(&value, &bits, sizeof value);
  load(more, row);
  value += weight * more;
  store(out, value);
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits &= 0x7fffffff;
  largest = bits > largest ? bits : largest;
}

template <bool kWeighted, bool kRouted>
bool sum_as(const RowSum& whole, int64_t first, int64_t limit) {
  constexpr int64_t kAhead = 16;  // rows
  const RowSum sum = whole;       // where no store can change it
  const int64_t dim = sum.dim;
  WideBits widest = {};
  FourBits fours = {};
  int32_t largest = 0;
  int64_t known = first;  // the targets below it hold a sum, be it zero
  const auto clear_to = [&](int64_t target) {
    std::memset(sum.out + known * dim, 0, static_cast<size_t>((target - known) * dim) * sizeof(float));
    known = target;
  };
  const auto add_one = [&](int64_t i) {
    const int64_t target = sum.targets[i];
    if (target < first || target >= limit) return;
    if (target > known) clear_to(target);
    const int32_t is_first = target == known, seen = is_first - 1;
    known += is_first;
    const float weight = kWeighted ? sum.weights[i] : 1.0f;
    const float* row = sum.rows + (kRouted ? sum.sources[i] : i) * dim;
    float* out = sum.out + target * dim;
    int64_t j = 0;
    for (; j + kWide / 4 <= dim; j += kWide / 4) add_to<Wide>(out + j, seen, row + j, weight, widest);
    for (; j + 4 <= dim; j += 4) add_to<Four>(out + j, seen, row + j, weight, fours);
    for (; j < dim; j++) add_to<float>(out + j, seen, row + j, weight, largest);
  };
  int64_t i = 0;
  for (; i + kAhead < sum.count; i++) {
    __builtin_prefetch(sum.out + sum.targets[i + kAhead] * dim, 1);
    if (kRouted) __builtin_prefetch(sum.rows + sum.sources[i + kAhead] * dim);
    add_one(i);
  }
  for (; i < sum.count; i++) add_one(i);
  clear_to(limit);
  for (int lane = 0; lane < kWide / 4; lane++) largest = widest[lane] > largest ? widest[lane] : largest;
  for (int lane = 0; lane < 4; lane++) largest = fours[lane] > largest ? fours[lane] : largest;
  return largest < 0x7f800000;
}

bool sum(const RowSum& sum, int64_t first, int64_t limit) {
  if (sum.weights == nullptr) return sum.sources == nullptr ? sum_as<false, false>(sum, first, limit) : sum_as<false, true>(sum, first, limit);
  return sum.sources == nullptr ? sum_as<true, false>(sum, first, limit) : sum_as<true, true>(sum, first, limit);
}

}  // namespace

extern const RowLevel HEADWATER_JOIN(rows_, HEADWATER_LEVEL);
const RowLevel HEADWATER_JOIN(rows_, HEADWATER_LEVEL) = {
    {step<Sgd>, step<Adagrad>, step_rowwise, step<Adam>, step<Ftrl>}, fill, sum,
};

}  // namespace headwater
