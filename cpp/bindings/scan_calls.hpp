// The call of linear attention with decay, of the CPU core and of CUDA devices alike; `Place` and `names` as in
// attention_calls.hpp.
#pragma once

#include "views.hpp"
#include "vlm/recurrent.hpp"

namespace vlm::bindings {

namespace py = pybind11;

template <class... Place, class Run, class... Names>
void define_linear_scan(py::module_& m, Run compute, Names... names) {
  m.def(
      "linear_scan",
      [compute](const std::array<int64_t, 5>& n, const View& q, const View& k, const View& v, uintptr_t log_decay,
                uintptr_t state, uintptr_t keep, uintptr_t run, bool reverse, int64_t chunk, const View& out,
                uintptr_t final_state, uintptr_t boundaries, int64_t boundary_every, Place... place) {
        const LinearScan call{n[0],
                              n[1],
                              n[2],
                              n[3],
                              n[4],
                              input(q),
                              input(k),
                              input(v),
                              address<const float>(log_decay),
                              address<const float>(state),
                              address<const uint8_t>(keep),
                              address<const int32_t>(run),
                              reverse,
                              chunk,
                              output(out),
                              address<float>(final_state),
                              address<float>(boundaries),
                              boundary_every};
        py::gil_scoped_release release;
        compute(call, place...);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("log_decay"), py::arg("state"),
      py::arg("keep"), py::arg("run"), py::arg("reverse"), py::arg("chunk"), py::arg("out"), py::arg("final_state"),
      py::arg("boundaries"), py::arg("boundary_every"), names...,
      "Linear attention with decay; see vlm/recurrent.hpp.");
}

}  // namespace vlm::bindings
