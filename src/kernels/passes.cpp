// One pass over one block: sum of contributions, optimizer, planes written. Compiled once per SIMD level.
//
//   stage 1   g := Σ c_i·g_i in the master dtype, from the left to the right; every g_i is checked for NaN and infinity
//   stage 2   the optimizer, from the source planes into the target planes, around the cache when asked for
//
// One or two contributions in the master's own dtype need no stage 1: they are summed in registers. Otherwise a chunk of
// 1024 elements goes through both stages at a time, the gradient staying in the first-level cache in between.
// Only + − × ÷ and square root, never contracted or reordered, so every level and thread count gives the same bits.

#include "passes.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define HEADWATER_JOIN_(a, b) a##b
#define HEADWATER_JOIN(a, b) HEADWATER_JOIN_(a, b)
#define HEADWATER_TEXT_(a) #a
#define HEADWATER_TEXT(a) HEADWATER_TEXT_(a)

namespace headwater {
namespace {

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T least(T a, T b) { return b < a ? b : a; }
template <class T>
inline T most(T a, T b) { return a < b ? b : a; }

// ---- vectors ---------------------------------------------------------------------------------------------------
// The compiler's own vector types, as wide as the level has them. The optimizers are written once, for T and for a vector of T.

#if defined(__AVX512F__)
#define HEADWATER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define HEADWATER_VECTOR_BYTES 32
#else
#define HEADWATER_VECTOR_BYTES 16
#endif

typedef float Floats __attribute__((vector_size(HEADWATER_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(HEADWATER_VECTOR_BYTES)));
typedef uint32_t FloatBits __attribute__((vector_size(HEADWATER_VECTOR_BYTES)));
typedef uint64_t DoubleBits __attribute__((vector_size(HEADWATER_VECTOR_BYTES)));

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
#if defined(__AVX512F__)
inline Floats root(Floats x) { return _mm512_sqrt_ps(x); }
inline Doubles root(Doubles x) { return _mm512_sqrt_pd(x); }
inline void stream(void* target, Floats x) { _mm512_stream_ps(static_cast<float*>(target), x); }
inline void stream(void* target, Doubles x) { _mm512_stream_pd(static_cast<double*>(target), x); }
#elif defined(__AVX2__)
inline Floats root(Floats x) { return _mm256_sqrt_ps(x); }
inline Doubles root(Doubles x) { return _mm256_sqrt_pd(x); }
inline void stream(void* target, Floats x) { _mm256_stream_ps(static_cast<float*>(target), x); }
inline void stream(void* target, Doubles x) { _mm256_stream_pd(static_cast<double*>(target), x); }
#elif defined(__SSE2__)
inline Floats root(Floats x) { return _mm_sqrt_ps(x); }
inline Doubles root(Doubles x) { return _mm_sqrt_pd(x); }
inline void stream(void* target, Floats x) { _mm_stream_ps(static_cast<float*>(target), x); }
inline void stream(void* target, Doubles x) { _mm_stream_pd(static_cast<double*>(target), x); }
#else
template <class V>
inline V root(V x) {
  for (unsigned i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = root(x[i]);
  return x;
}
template <class V>
inline void stream(void* target, V x) { __builtin_memcpy(target, &x, sizeof x); }
#endif

template <class V>
inline V load(const void* source) {
  V x;
  __builtin_memcpy(&x, source, sizeof x);
  return x;
}

// Ask for memory that is read soon: the CPU's own prefetcher stops at every page, and starts anew with each of many streams.
constexpr int64_t kAheadBytes = 2048;
inline void prefetch_ahead(const void* pointer) { __builtin_prefetch(static_cast<const char*>(pointer) + kAheadBytes); }

inline bool is_aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 63) == 0; }

// ---- wire dtypes ---------------------------------------------------------------------------------------------
// `Bits` is how an element travels. An element is NaN or infinite when its exponent is all ones, that is when
// (bits without sign) + kExponentUnit carries into the sign's place.

struct Float32 {
  using Bits = uint32_t;
  using Master = float;
  using Vector = Floats;
  using VectorBits = FloatBits;
  static constexpr Bits kSign = 0x80000000u, kExponentUnit = 0x00800000u;
  static constexpr bool kNarrow = false;
  static inline float widen(Bits b) { return bits_of<float>(b); }
};

struct Float64 {
  using Bits = uint64_t;
  using Master = double;
  using Vector = Doubles;
  using VectorBits = DoubleBits;
  static constexpr Bits kSign = 0x8000000000000000u, kExponentUnit = 0x0010000000000000u;
  static constexpr bool kNarrow = false;
  static inline double widen(Bits b) { return bits_of<double>(b); }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Master = float;
  using Vector = Floats;
  static constexpr Bits kSign = 0x8000u, kExponentUnit = 0x0080u;
  static constexpr bool kNarrow = true;
  static inline float widen(Bits b) { return bits_of<float>(static_cast<uint32_t>(b) << 16); }
  static inline Bits narrow(float x) {
    const uint32_t b = bits_of<uint32_t>(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const uint32_t quiet = (b >> 16) | 0x40u;
    return static_cast<Bits>((b & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  using Master = float;
  using Vector = Floats;
  static constexpr Bits kSign = 0x8000u, kExponentUnit = 0x0400u;
  static constexpr bool kNarrow = true;
  static inline float widen(Bits b) {
    const uint32_t magnitude = b & 0x7fffu, sign = static_cast<uint32_t>(b & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = ((magnitude << 13) + (224u << 23)) | (magnitude > 0x7c00u ? 0x400000u : 0u);
    const uint32_t small = bits_of<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t finite = magnitude < 0x0400u ? small : normal;
    return bits_of<float>((magnitude >= 0x7c00u ? special : finite) | sign);
  }
  static inline Bits narrow(float x) {
    const uint32_t b = bits_of<uint32_t>(x), magnitude = b & 0x7fffffffu, sign = (b >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding one half shifts a subnormal's bits to the bottom of the mantissa, rounding on the way.
    const uint32_t small = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t quiet = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    const uint32_t special = magnitude > 0x7f800000u ? quiet : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    return static_cast<Bits>((magnitude >= 0x47800000u ? special : finite) | sign);
  }
};

template <class W>
void narrow_all(uint16_t* __restrict target, const float* __restrict source, int64_t n) {
  for (int64_t i = 0; i < n; i++) target[i] = W::narrow(source[i]);
}

template <class W>
void widen_all(float* __restrict target, const uint16_t* __restrict source, int64_t n) {
  for (int64_t i = 0; i < n; i++) target[i] = W::widen(source[i]);
}

#if defined(__F16C__)
// The CPU's own conversion; the same bits as the loops above.
template <>
void narrow_all<Float16>(uint16_t* __restrict target, const float* __restrict source, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
  for (; i < n; i++) target[i] = Float16::narrow(source[i]);
}

template <>
void widen_all<Float16>(float* __restrict target, const uint16_t* __restrict source, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; i++) target[i] = Float16::widen(source[i]);
}
#endif

// ---- stage 1: the aggregated gradient ------------------------------------------------------------------------

// sum (first) or add c·g to acc. Returns non-zero when g holds NaN or infinity.
template <class W, bool first>
typename W::Bits gather(const typename W::Bits* __restrict g, typename W::Master c,
                        typename W::Master* __restrict acc, int64_t n) {
  using Bits = typename W::Bits;
  Bits bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const Bits b = g[i];
    bad |= static_cast<Bits>((b & static_cast<Bits>(~W::kSign)) + W::kExponentUnit);
    const typename W::Master x = c * W::widen(b);
    acc[i] = first ? x : acc[i] + x;
  }
  return bad & W::kSign;
}

// The same for two contributions at once: one trip through acc less.
template <class W, bool first>
typename W::Bits gather_two(const typename W::Bits* __restrict g, typename W::Master c,
                            const typename W::Bits* __restrict h, typename W::Master d,
                            typename W::Master* __restrict acc, int64_t n) {
  using Bits = typename W::Bits;
  Bits bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const Bits a = g[i], b = h[i];
    bad |= static_cast<Bits>((a & static_cast<Bits>(~W::kSign)) + W::kExponentUnit);
    bad |= static_cast<Bits>((b & static_cast<Bits>(~W::kSign)) + W::kExponentUnit);
    const typename W::Master x = c * W::widen(a), y = d * W::widen(b);
    acc[i] = first ? x + y : (acc[i] + x) + y;
  }
  return bad & W::kSign;
}

#if defined(__F16C__)
// float16 goes through a widened copy in the first-level cache; widening keeps NaN and infinity what they are.
template <bool first>
bool gather_half(const uint16_t* g, float c, float* acc, int64_t n) {
  alignas(64) float wide[kChunk];
  widen_all<Float16>(wide, g, n);
  return gather<Float32, first>(reinterpret_cast<const uint32_t*>(wide), c, acc, n) != 0;
}
#endif

template <class W>
struct Gather {
  static bool one(bool first, const typename W::Bits* g, typename W::Master c, typename W::Master* acc, int64_t n) {
    return (first ? gather<W, true>(g, c, acc, n) : gather<W, false>(g, c, acc, n)) != 0;
  }
  static bool two(bool first, const typename W::Bits* g, typename W::Master c, const typename W::Bits* h,
                  typename W::Master d, typename W::Master* acc, int64_t n) {
    return (first ? gather_two<W, true>(g, c, h, d, acc, n) : gather_two<W, false>(g, c, h, d, acc, n)) != 0;
  }
};

#if defined(__F16C__)
template <>
struct Gather<Float16> {
  static bool one(bool first, const uint16_t* g, float c, float* acc, int64_t n) {
    return first ? gather_half<true>(g, c, acc, n) : gather_half<false>(g, c, acc, n);
  }
  static bool two(bool first, const uint16_t* g, float c, const uint16_t* h, float d, float* acc, int64_t n) {
    const bool bad = one(first, g, c, acc, n);
    return one(false, h, d, acc, n) || bad;
  }
};
#endif

// acc := Σ coefficient·contribution over elements [at, at + n), absent contributions left out. True: not finite.
template <class W>
bool aggregate(const Commit& commit, const double* coefficients, int64_t at, int64_t n,
               typename W::Master* __restrict acc) {
  using Bits = typename W::Bits;
  using T = typename W::Master;
  bool bad = false, first = true;
  int64_t held = -1;  // a contribution waiting for a second one
  for (int64_t i = 0; i < commit.contribution_count; i++) {
    if (coefficients[i] == 0.0) continue;
    if (held < 0) {
      held = i;
      continue;
    }
    const auto* g = static_cast<const Bits*>(commit.contributions[held]) + at;
    const auto* h = static_cast<const Bits*>(commit.contributions[i]) + at;
    bad |= Gather<W>::two(first, g, static_cast<T>(coefficients[held]), h, static_cast<T>(coefficients[i]), acc, n);
    first = false;
    held = -1;
  }
  if (held >= 0) {
    const auto* g = static_cast<const Bits*>(commit.contributions[held]) + at;
    bad |= Gather<W>::one(first, g, static_cast<T>(coefficients[held]), acc, n);
    first = false;
  }
  if (first) std::memset(acc, 0, static_cast<size_t>(n) * sizeof(T));
  return bad;
}

// What stage 2 takes the gradient from: an aggregated chunk, or one or two contributions that it sums itself.
// `at` gives element i, or as many elements from i on as V holds.

template <class W>
struct Aggregated {
  const typename W::Master* g;
  template <class V>
  V at(int64_t i) { return load<V>(g + i); }
  void prefetch(int64_t) const {}  // in the first-level cache already
  bool is_bad() const { return false; }
};

// The bits of one contribution or'ed together the way `gather` does it.
template <class W>
struct Check {
  typename W::Bits scalar = 0;
  typename W::VectorBits vector = {};
  void see(typename W::Master x) { scalar |= (bits_of<typename W::Bits>(x) & ~W::kSign) + W::kExponentUnit; }
  void see(typename W::Vector x) { vector |= (bits_of<typename W::VectorBits>(x) & ~W::kSign) + W::kExponentUnit; }
  bool is_bad() const {
    typename W::Bits all = scalar;
    for (unsigned i = 0; i < sizeof vector / sizeof scalar; i++) all |= vector[i];
    return (all & W::kSign) != 0;
  }
};

template <class W>
struct One {
  const typename W::Bits* g;
  typename W::Master c;
  Check<W> check = {};
  template <class V>
  V at(int64_t i) {
    const V x = load<V>(g + i);
    check.see(x);
    return c * x;
  }
  void prefetch(int64_t i) const { prefetch_ahead(g + i); }
  bool is_bad() const { return check.is_bad(); }
};

template <class W>
struct Two {
  const typename W::Bits *g, *h;
  typename W::Master c, d;
  Check<W> check = {};
  template <class V>
  V at(int64_t i) {
    const V x = load<V>(g + i), y = load<V>(h + i);
    check.see(x);
    check.see(y);
    return c * x + d * y;
  }
  void prefetch(int64_t i) const {
    prefetch_ahead(g + i);
    prefetch_ahead(h + i);
  }
  bool is_bad() const { return check.is_bad(); }
};

// ---- stage 2: the optimizers ---------------------------------------------------------------------------------
// The formulas are those of torch.optim, the scalars those that optim.py prepared in float64. `from` and `to` are the master
// plane and then the slots: one element of each, or a vector of elements.

// from + weight·(to − from), in the two forms that torch.lerp has, so that weight 1 gives `to` exactly.
template <class V, class T>
inline V lerp(V from, V to, T weight) {
  return weight < T(0.5) ? from + weight * (to - from) : to - (to - from) * (T(1) - weight);
}

template <class T>
struct Mean {
  static constexpr int kPlanes = 1;
  explicit Mean(const T*) {}
  template <class V>
  void operator()(V g, const V*, V* to) const { to[0] = g; }
};

template <class T, bool momentum, bool nesterov>
struct Sgd {
  static constexpr int kPlanes = momentum ? 2 : 1;
  const T lr, decay, mu, fresh;
  explicit Sgd(const T* s) : lr(s[0]), decay(s[1]), mu(s[2]), fresh(s[3]) {}
  template <class V>
  void operator()(V g, const V* from, V* to) const {
    V d = g + decay * from[0];
    if constexpr (momentum) {
      to[1] = mu * from[1] + fresh * d;
      d = nesterov ? fresh * d + mu * to[1] : to[1];
    }
    to[0] = from[0] - lr * d;
  }
};

template <class T>
struct Adagrad {
  static constexpr int kPlanes = 2;
  const T lr, decay, eps;
  explicit Adagrad(const T* s) : lr(s[0]), decay(s[1]), eps(s[2]) {}
  template <class V>
  void operator()(V g, const V* from, V* to) const {
    const V d = g + decay * from[0];
    to[1] = from[1] + d * d;
    to[0] = from[0] - lr * d / (root(to[1]) + eps);
  }
};

template <class T, bool momentum, bool centered>
struct RmsProp {
  static constexpr int kPlanes = 2 + centered + momentum;
  const T lr, decay, alpha, fresh, eps, mu, inner, gain;
  explicit RmsProp(const T* s)
      : lr(s[0]), decay(s[1]), alpha(s[2]), fresh(s[3]), eps(s[4]), mu(s[5]), inner(s[6]), gain(s[7]) {}
  template <class V>
  void operator()(V g, const V* from, V* to) const {
    const V d = g + decay * from[0];
    to[1] = alpha * from[1] + fresh * d * d;
    V spread = to[1];
    if constexpr (centered) {
      to[2] = lerp(from[2], d, fresh);
      spread = to[1] - to[2] * to[2];
    }
    const V scale = root(spread + inner) + eps;
    if constexpr (momentum) {
      constexpr int buffer = kPlanes - 1;
      to[buffer] = mu * from[buffer] + gain * d / scale;
      to[0] = from[0] - lr * to[buffer];
    } else {
      to[0] = from[0] - lr * d / scale;
    }
  }
};

template <class T, bool amsgrad, bool decoupled>
struct Adam {
  static constexpr int kPlanes = amsgrad ? 4 : 3;
  const T step_size, decay, fresh1, beta2, fresh2, correction, eps;
  explicit Adam(const T* s)
      : step_size(s[0]), decay(s[1]), fresh1(s[2]), beta2(s[3]), fresh2(s[4]), correction(s[5]), eps(s[6]) {}
  template <class V>
  void operator()(V g, const V* from, V* to) const {
    const V x = decoupled ? from[0] * decay : from[0];  // decoupled: what is left of the parameter
    const V d = decoupled ? g : g + decay * x;
    to[1] = lerp(from[1], d, fresh1);
    to[2] = beta2 * from[2] + fresh2 * d * d;
    V v = to[2];
    if constexpr (amsgrad) to[3] = v = from[3] > v ? from[3] : v;
    to[0] = x - step_size * to[1] / (root(v) / correction + eps);
  }
};

template <class T>
struct Planes {
  const T* from[kPlanesMax];
  T* to[kPlanesMax];  // the same memory as `from`, or memory apart
};

// Elements [i, i + lanes of V).
template <class V, class T, class Step, class Source>
inline void take(const Step& step, Source& source, const Planes<T>& planes, int64_t i) {
  V from[Step::kPlanes], to[Step::kPlanes];
  for (int k = 0; k < Step::kPlanes; k++) from[k] = load<V>(planes.from[k] + i);
  step(source.template at<V>(i), from, to);
  for (int k = 0; k < Step::kPlanes; k++) __builtin_memcpy(planes.to[k] + i, &to[k], sizeof(V));
}

// One cache line of elements; planes from `first` on are written around the cache. A plane's line is written in one go: the
// CPU gathers such a line in one of a few buffers, and planes taking turns would drive each other's half-full lines out.
template <class V, int first, class T, class Step, class Source>
inline void take_line(const Step& step, Source& source, const Planes<T>& planes, int64_t i) {
  constexpr int parts = 64 / sizeof(V), lanes = sizeof(V) / sizeof(T);
  V to[parts][Step::kPlanes];
  source.prefetch(i);
  for (int k = 0; k < Step::kPlanes; k++) prefetch_ahead(planes.from[k] + i);
  for (int j = 0; j < parts; j++) {
    V from[Step::kPlanes];
    for (int k = 0; k < Step::kPlanes; k++) from[k] = load<V>(planes.from[k] + i + j * lanes);
    step(source.template at<V>(i + j * lanes), from, to[j]);
  }
  for (int k = 0; k < Step::kPlanes; k++) {
    for (int j = 0; j < parts; j++) {
      if (k >= first) stream(planes.to[k] + i + j * lanes, to[j][k]);
      else __builtin_memcpy(planes.to[k] + i + j * lanes, &to[j][k], sizeof(V));
    }
  }
}

template <class W, class Step, class Source>
bool sweep(const Step& step, Source source, const Planes<typename W::Master>& planes, int64_t n, bool streamed) {
  using T = typename W::Master;
  using V = typename W::Vector;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  constexpr int first = W::kNarrow ? 1 : 0;  // a narrow lane's master plane is read again at once
  for (int k = first; k < Step::kPlanes; k++) streamed = streamed && is_aligned(planes.to[k]);
  int64_t i = 0;
  if (streamed) {
    constexpr int64_t line = 64 / sizeof(T);
    for (; i + line <= n; i += line) take_line<V, first>(step, source, planes, i);
  }
  for (; i + lanes <= n; i += lanes) take<V>(step, source, planes, i);
  for (; i < n; i++) take<T>(step, source, planes, i);
  return !source.is_bad();
}

// A run's gradient as stage 2 takes it: `count` contributions, or none and an aggregated chunk.
template <class W>
struct Gradient {
  int count;
  const typename W::Bits* contributions[2];
  typename W::Master coefficients[2];
  const typename W::Master* aggregated;
};

// False: not finite.
template <class W, class Step>
bool run_step(const typename W::Master* scalars, const Gradient<W>& g, const Planes<typename W::Master>& planes, int64_t n,
              bool streamed) {
  const Step step(scalars);
  if constexpr (!W::kNarrow) {
    if (g.count == 1) return sweep<W>(step, One<W>{g.contributions[0], g.coefficients[0]}, planes, n, streamed);
    if (g.count == 2) {
      const Two<W> both{g.contributions[0], g.contributions[1], g.coefficients[0], g.coefficients[1]};
      return sweep<W>(step, both, planes, n, streamed);
    }
  }
  return sweep<W>(step, Aggregated<W>{g.aggregated}, planes, n, streamed);
}

template <class W>
using RunStep = bool (*)(const typename W::Master* scalars, const Gradient<W>& g,
                         const Planes<typename W::Master>& planes, int64_t n, bool streamed);

template <class W>
RunStep<W> step_of(Optimizer optimizer, int flags) {
  using T = typename W::Master;
  const bool first = flags & 1, second = flags & 2;  // kMomentum or kAmsgrad; kNesterov or kCentered
  switch (optimizer) {
    case Optimizer::sgd:
      if (!first) return run_step<W, Sgd<T, false, false>>;
      return second ? run_step<W, Sgd<T, true, true>> : run_step<W, Sgd<T, true, false>>;
    case Optimizer::adagrad:
      return run_step<W, Adagrad<T>>;
    case Optimizer::rmsprop:
      if (first) return second ? run_step<W, RmsProp<T, true, true>> : run_step<W, RmsProp<T, true, false>>;
      return second ? run_step<W, RmsProp<T, false, true>> : run_step<W, RmsProp<T, false, false>>;
    case Optimizer::adam:
      return first ? run_step<W, Adam<T, true, false>> : run_step<W, Adam<T, false, false>>;
    case Optimizer::adamw:
      return first ? run_step<W, Adam<T, true, true>> : run_step<W, Adam<T, false, true>>;
    case Optimizer::mean:
      return run_step<W, Mean<T>>;
  }
  return nullptr;
}

// ---- copying -------------------------------------------------------------------------------------------------

// Copies; streamed: whole cache lines go to memory directly, so the target's old bytes are never read.
void put(void* target, const void* source, int64_t bytes, bool streamed) {
#if defined(__SSE2__)
  if (streamed && is_aligned(target)) {
    auto* to = static_cast<__m128i*>(target);
    const auto* from = static_cast<const __m128i*>(source);
    const int64_t lines = bytes / 64;
    for (int64_t i = 0; i < lines; i++, to += 4, from += 4) {
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    std::memcpy(to, from, static_cast<size_t>(bytes - lines * 64));
    return;
  }
#else
  (void)streamed;
#endif
  std::memcpy(target, source, static_cast<size_t>(bytes));
}

void flush(bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

// ---- one block -----------------------------------------------------------------------------------------------

// The first run that reaches beyond `element`.
const Run* run_at(const Commit& commit, int64_t element) {
  int64_t low = 0, high = commit.run_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (commit.runs[middle].stop > element) high = middle;
    else low = middle + 1;
  }
  return commit.runs + low;
}

template <class W>
int64_t plane_bytes(int plane) {
  return W::kNarrow && plane == 0 ? static_cast<int64_t>(sizeof(typename W::Bits))
                                  : static_cast<int64_t>(sizeof(typename W::Master));
}

template <class W>
void copy_through(const Pass& pass, int64_t start, int64_t stop) {
  for (int i = 0; i < pass.plane_count; i++) {
    const int64_t item = plane_bytes<W>(i);
    put(static_cast<char*>(pass.target[i]) + start * item, static_cast<const char*>(pass.source[i]) + start * item,
        (stop - start) * item, pass.streamed);
  }
}

// The contributions that count in a run, when stage 2 can sum them itself; else count 0.
template <class W>
Gradient<W> directly(const Commit& commit, const double* coefficients, int64_t at) {
  Gradient<W> found = {};
  if constexpr (!W::kNarrow) {
    for (int64_t i = 0; i < commit.contribution_count; i++) {
      if (coefficients[i] == 0.0) continue;
      if (found.count == 2) return {};
      found.contributions[found.count] = static_cast<const typename W::Bits*>(commit.contributions[i]) + at;
      found.coefficients[found.count++] = static_cast<typename W::Master>(coefficients[i]);
    }
  }
  return found;
}

// One commit over [start, stop), all of one run. False: not finite.
template <class W>
bool apply_run(const Pass& pass, int64_t index, const Run& run, int64_t start, int64_t stop, RunStep<W> step) {
  using T = typename W::Master;
  const Commit& commit = pass.commits[index];
  const double* coefficients = commit.coefficients + (&run - commit.runs) * commit.contribution_count;
  T scalars[kScalarsMax];
  for (int64_t i = 0; i < commit.width; i++) scalars[i] = static_cast<T>(commit.scalars[run.row * commit.width + i]);

  alignas(64) T gradient[kChunk];
  alignas(64) float master[kChunk];
  alignas(64) uint16_t wire[kChunk];
  constexpr int narrow = W::kNarrow ? 1 : 0;
  Gradient<W> g = directly<W>(commit, coefficients, start);
  const int64_t piece = g.count > 0 ? stop - start : kChunk;
  for (int64_t at = start; at < stop; at += piece) {
    const int64_t n = least(piece, stop - at);
    if (g.count == 0) {
      if (aggregate<W>(commit, coefficients, at, n, gradient) && pass.is_checked) return false;
      g.aggregated = gradient;
    }
    Planes<T> planes = {};
    for (int i = narrow; i < pass.plane_count; i++) {
      const void* plane = index == 0 ? pass.source[i] : pass.target[i];
      planes.from[i - narrow] = static_cast<const T*>(plane) + at;
      planes.to[i - narrow] = static_cast<T*>(pass.target[i]) + at;
    }
    if constexpr (W::kNarrow) {  // the master plane by way of the cache, for it is rounded to the wire plane as well
      planes.to[0] = master;
      step(scalars, g, planes, n, pass.streamed);
      put(static_cast<T*>(pass.target[1]) + at, master, n * static_cast<int64_t>(sizeof(T)), pass.streamed);
      narrow_all<W>(wire, master, n);
      put(static_cast<uint16_t*>(pass.target[0]) + at, wire, n * 2, pass.streamed);
    } else if (!step(scalars, g, planes, n, pass.streamed) && pass.is_checked) {
      return false;
    }
  }
  return true;
}

template <class W>
bool apply_block(const Pass& pass, int64_t block) {
  const int64_t first = block * kBlock, limit = least(first + kBlock, pass.elements);
  const RunStep<W> step = step_of<W>(pass.optimizer, pass.flags);
  for (int64_t index = 0; index < pass.commit_count; index++) {
    const Commit& commit = pass.commits[index];
    for (const Run* run = run_at(commit, first); run < commit.runs + commit.run_count && run->start < limit; run++) {
      const int64_t start = most(first, run->start), stop = least(limit, run->stop);
      if (run->row < 0) {
        if (index == 0) copy_through<W>(pass, start, stop);
      } else if (!apply_run<W>(pass, index, *run, start, stop, step)) {
        flush(pass.streamed);
        return false;
      }
    }
  }
  flush(pass.streamed);
  return true;
}

// What apply_run hands to the optimizer, written to memory instead.
template <class W>
void aggregate_block(const Commit& commit, int64_t elements, typename W::Master* out, bool streamed, int64_t block) {
  using T = typename W::Master;
  const int64_t first = block * kBlock, limit = least(first + kBlock, elements);
  alignas(64) T gradient[kChunk];
  for (const Run* run = run_at(commit, first); run < commit.runs + commit.run_count && run->start < limit; run++) {
    const int64_t start = most(first, run->start), stop = least(limit, run->stop);
    const double* coefficients = commit.coefficients + (run - commit.runs) * commit.contribution_count;
    const Gradient<W> g = run->row < 0 ? Gradient<W>{} : directly<W>(commit, coefficients, start);
    if (g.count > 0) {
      Planes<T> planes = {};
      planes.from[0] = reinterpret_cast<const T*>(g.contributions[0]);  // only prefetched
      planes.to[0] = out + start;
      run_step<W, Mean<T>>(nullptr, g, planes, stop - start, streamed);
      continue;
    }
    if (run->row < 0) std::memset(gradient, 0, sizeof gradient);
    for (int64_t at = start; at < stop; at += kChunk) {
      const int64_t n = least(kChunk, stop - at);
      if (run->row >= 0) aggregate<W>(commit, coefficients, at, n, gradient);
      put(out + at, gradient, n * static_cast<int64_t>(sizeof(T)), streamed);
    }
  }
  flush(streamed);
}

// Four numbers that the compiler keeps in registers.
template <class T>
struct Four;
template <>
struct Four<float> {
  typedef float Vector __attribute__((vector_size(16)));
};
template <>
struct Four<double> {
  typedef double Vector __attribute__((vector_size(32)));
};
using FourDoubles = Four<double>::Vector;

template <class T>
inline typename Four<T>::Vector four_at(const T* values) {
  typename Four<T>::Vector four;
  std::memcpy(&four, values, sizeof four);
  return four;
}

template <class Vector>
inline FourDoubles square_of(Vector four) {
  const FourDoubles x = __builtin_convertvector(four, FourDoubles);
  return x * x;
}

// The two contributions that a run sums, and nothing else: then their sum need not go through memory.
template <class T>
struct Pair {
  const T* g = nullptr;
  const T* h = nullptr;
  T g_share = 0, h_share = 0;

  Pair() = default;
  Pair(const Commit& commit, const Run* run) {
    const double* coefficients = commit.coefficients + (run - commit.runs) * commit.contribution_count;
    int found = 0;
    for (int64_t i = 0; i < commit.contribution_count; i++) {
      if (coefficients[i] == 0.0) continue;
      (found == 0 ? g : h) = static_cast<const T*>(commit.contributions[i]);
      (found == 0 ? g_share : h_share) = static_cast<T>(coefficients[i]);
      found++;
    }
    if (found != 2) g = h = nullptr;
  }

  inline FourDoubles square_at(int64_t i) const { return square_of(g_share * four_at(g + i) + h_share * four_at(h + i)); }
};

// Lane i of 16 takes the elements i, i + 16, … of the block; then lane i takes lane i + 8, i + 4, i + 2, i + 1.
template <class W>
double square_block(const Commit& commit, int64_t elements, int64_t block) {
  using T = typename W::Master;
  const int64_t first = block * kBlock, limit = least(first + kBlock, elements);
  alignas(64) T gradient[kChunk];
  FourDoubles a = {}, b = {}, c = {}, d = {};  // lanes 0–3, 4–7, 8–11, 12–15
  const Run* run = run_at(commit, first);
  for (int64_t at = first; at < limit; at += kChunk) {
    const int64_t end = least(at + kChunk, limit);
    const bool is_covered = run < commit.runs + commit.run_count && run->row >= 0 && run->start <= at && run->stop >= end;
    if constexpr (!W::kNarrow) {
      const Pair<T> pair = is_covered && end - at == kChunk ? Pair<T>(commit, run) : Pair<T>();
      if (pair.g != nullptr) {
        for (int64_t i = at; i < end; i += 16) {
          prefetch_ahead(pair.g + i);
          prefetch_ahead(pair.h + i);
          a += pair.square_at(i);
          b += pair.square_at(i + 4);
          c += pair.square_at(i + 8);
          d += pair.square_at(i + 12);
        }
        continue;
      }
    }
    if (!is_covered || end - at < kChunk) std::memset(gradient, 0, sizeof gradient);  // what no run covers adds nothing
    for (const Run* r = run; r < commit.runs + commit.run_count && r->start < end; r++) {
      if (r->stop <= at) {
        run = r + 1;
        continue;
      }
      if (r->row < 0) continue;
      const int64_t start = most(at, r->start), stop = least(end, r->stop);
      aggregate<W>(commit, commit.coefficients + (r - commit.runs) * commit.contribution_count, start, stop - start,
                   gradient + (start - at));
    }
    for (int64_t i = 0; i < kChunk; i += 16) {
      a += square_of(four_at(gradient + i));
      b += square_of(four_at(gradient + i + 4));
      c += square_of(four_at(gradient + i + 8));
      d += square_of(four_at(gradient + i + 12));
    }
  }
  const FourDoubles four = (a + c) + (b + d);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class W>
int64_t find_in(const void* values, int64_t start, int64_t stop) {
  using Bits = typename W::Bits;
  const auto* all = static_cast<const Bits*>(values);
  for (int64_t at = start; at < stop; at += kChunk) {
    const int64_t end = least(at + kChunk, stop);
    Bits bad = 0;
    for (int64_t i = at; i < end; i++) {
      bad |= static_cast<Bits>((all[i] & static_cast<Bits>(~W::kSign)) + W::kExponentUnit);
    }
    if (!(bad & W::kSign)) continue;
    for (int64_t i = at; i < end; i++) {
      if (static_cast<Bits>((all[i] & static_cast<Bits>(~W::kSign)) + W::kExponentUnit) & W::kSign) return i;
    }
  }
  return -1;
}

// ---- by wire dtype -------------------------------------------------------------------------------------------

bool apply(const Pass& pass, int64_t block) {
  switch (pass.wire) {
    case Wire::float32: return apply_block<Float32>(pass, block);
    case Wire::float64: return apply_block<Float64>(pass, block);
    case Wire::bfloat16: return apply_block<BFloat16>(pass, block);
    case Wire::float16: return apply_block<Float16>(pass, block);
  }
  return false;
}

double square_sum(Wire wire, const Commit& commit, int64_t elements, int64_t block) {
  switch (wire) {
    case Wire::float32: return square_block<Float32>(commit, elements, block);
    case Wire::float64: return square_block<Float64>(commit, elements, block);
    case Wire::bfloat16: return square_block<BFloat16>(commit, elements, block);
    case Wire::float16: return square_block<Float16>(commit, elements, block);
  }
  return 0.0;
}

void aggregate_gradient(Wire wire, const Commit& commit, int64_t elements, void* out, bool streamed, int64_t block) {
  switch (wire) {
    case Wire::float32: return aggregate_block<Float32>(commit, elements, static_cast<float*>(out), streamed, block);
    case Wire::float64: return aggregate_block<Float64>(commit, elements, static_cast<double*>(out), streamed, block);
    case Wire::bfloat16: return aggregate_block<BFloat16>(commit, elements, static_cast<float*>(out), streamed, block);
    case Wire::float16: return aggregate_block<Float16>(commit, elements, static_cast<float*>(out), streamed, block);
  }
}

int64_t find_non_finite(Wire wire, const void* values, int64_t start, int64_t stop) {
  switch (wire) {
    case Wire::float32: return find_in<Float32>(values, start, stop);
    case Wire::float64: return find_in<Float64>(values, start, stop);
    case Wire::bfloat16: return find_in<BFloat16>(values, start, stop);
    case Wire::float16: return find_in<Float16>(values, start, stop);
  }
  return -1;
}

void copy(void* target, const void* source, int64_t bytes, bool streamed) {
  put(target, source, bytes, streamed);
  flush(streamed);
}

void narrow(Wire wire, void* target, const float* source, int64_t elements) {
  auto* to = static_cast<uint16_t*>(target);
  if (wire == Wire::bfloat16) narrow_all<BFloat16>(to, source, elements);
  else narrow_all<Float16>(to, source, elements);
}

void widen(Wire wire, float* target, const void* source, int64_t elements) {
  const auto* from = static_cast<const uint16_t*>(source);
  if (wire == Wire::bfloat16) widen_all<BFloat16>(target, from, elements);
  else widen_all<Float16>(target, from, elements);
}

}  // namespace

extern const RowLevel HEADWATER_JOIN(rows_, HEADWATER_LEVEL);
extern const Level HEADWATER_JOIN(level_, HEADWATER_LEVEL);
const Level HEADWATER_JOIN(level_, HEADWATER_LEVEL) = {
    HEADWATER_TEXT(HEADWATER_LEVEL), apply, square_sum, aggregate_gradient, find_non_finite, copy, narrow, widen,
    &HEADWATER_JOIN(rows_, HEADWATER_LEVEL),
};

}  // namespace headwater
