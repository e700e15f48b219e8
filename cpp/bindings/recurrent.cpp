#include "vlm/recurrent.hpp"

#include <array>
#include <pybind11/stl.h>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

using View = std::array<int64_t, 4>;  // address, then batch, head and row stride

Heads input(const View& v) { return {address<const float>(static_cast<uintptr_t>(v[0])), v[1], v[2], v[3]}; }
MutableHeads output(const View& v) { return {address<float>(static_cast<uintptr_t>(v[0])), v[1], v[2], v[3]}; }

}  // namespace

void register_recurrent(py::module_& m) {
  m.def(
      "linear_scan",
      [](const std::array<int64_t, 5>& n, const View& q, const View& k, const View& v, uintptr_t log_decay,
         uintptr_t state, uintptr_t keep, uintptr_t run, bool reverse, int64_t chunk, const View& out,
         uintptr_t final_state, uintptr_t boundaries, int64_t boundary_every, int threads) {
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
        linear_scan(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("log_decay"), py::arg("state"),
      py::arg("keep"), py::arg("run"), py::arg("reverse"), py::arg("chunk"), py::arg("out"), py::arg("final_state"),
      py::arg("boundaries"), py::arg("boundary_every"), py::arg("threads"),
      "Linear attention with decay; see vlm/recurrent.hpp.");
}

}  // namespace vlm::bindings
