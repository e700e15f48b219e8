#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.hpp"
#include "vlm/level.hpp"
#include "vlm/parallel.hpp"

namespace vlm::bindings {

void register_runtime(pybind11::module_& m) {
  m.def("supported_levels", [] {
    std::vector<std::string> names;
    for (Level level : supported_levels()) names.emplace_back(level_name(level));
    return names;
  }, "Instruction-set levels that run here, lowest first.");
  m.def("active_level", [] { return std::string(level_name(active_level())); }, "The level in force.");
  m.def("set_level", [](const std::string& name) { set_level(level_from_name(name.c_str())); },
        "Force a level; for tests. ValueError if it is unknown or does not run here.", pybind11::arg("name"));
  m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether the level in force multiplies bfloat16 as it is.");
  m.def("pool_size", &pool_size, "Worker threads alive in this process.");
}

}  // namespace vlm::bindings
