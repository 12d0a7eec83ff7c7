// The Python face of tables and ids.
#pragma once

#include <nanobind/nanobind.h>

namespace headwater {

void add_tables(nanobind::module_& m);

}  // namespace headwater
