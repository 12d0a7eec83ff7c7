#include "levels.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace headwater {

PlainFloats::PlainFloats() {
#if defined(__SSE2__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80);  // to nearest, denormals kept, no traps
#endif
}

PlainFloats::~PlainFloats() {
#if defined(__SSE2__)
  _mm_setcsr(saved_);
#endif
}

const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> found = [] {
    std::vector<const Level*> all{&level_baseline};
#ifdef HEADWATER_X86_LEVELS
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C.
    if (__builtin_cpu_supports("avx2")) {
      all.push_back(&level_avx2);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq")) {
        all.push_back(&level_avx512);
      }
    }
#endif
    return all;
  }();
  return found;
}

const Level* find_level(const std::string& name) {
  if (name == "auto") return levels().back();
  for (const Level* level : levels()) {
    if (name == level->name) return level;
  }
  return nullptr;
}

}  // namespace headwater
