// Which SIMD levels this CPU has.
#pragma once

#include <string>
#include <vector>

#include "passes.h"

namespace headwater {

const std::vector<const Level*>& levels();      // worst first
const Level* find_level(const std::string& name);  // "auto": the best; nullptr: not on this CPU

}  // namespace headwater
