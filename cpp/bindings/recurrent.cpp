#include "scan_calls.hpp"

namespace vlm::bindings {
namespace {

using Pair = std::array<int64_t, 3>;  // address, then batch and row stride

Rows rows(const Pair& v) { return {address<const float>(static_cast<uintptr_t>(v[0])), v[1], v[2]}; }

SsmProblem ssm_problem(const std::array<int64_t, 4>& n, const std::array<Pair, 4>& rowed, uintptr_t rate,
                       uintptr_t skip, uintptr_t state, uintptr_t keep, uintptr_t run) {
  return {n[0],
          n[1],
          n[2],
          n[3],
          rows(rowed[0]),
          rows(rowed[1]),
          address<const float>(rate),
          rows(rowed[2]),
          rows(rowed[3]),
          address<const float>(skip),
          address<const float>(state),
          address<const uint8_t>(keep),
          address<const int32_t>(run)};
}

}  // namespace

void register_recurrent(py::module_& m) {
  define_linear_scan<int>(m, [](const LinearScan& call, int threads) { linear_scan(call, threads); },
                          py::arg("threads"));
  m.attr("SSM_CHUNK") = SSM_CHUNK;
  m.def(
      "ssm_forward",
      [](const std::array<int64_t, 4>& sizes, const std::array<Pair, 4>& x_delta_b_c, uintptr_t rate, uintptr_t skip,
         uintptr_t state, uintptr_t keep, uintptr_t run, uintptr_t out, uintptr_t final_state, uintptr_t boundaries,
         int threads) {
        const SsmForward call{ssm_problem(sizes, x_delta_b_c, rate, skip, state, keep, run), address<float>(out),
                              address<float>(final_state), address<float>(boundaries)};
        py::gil_scoped_release release;
        ssm_forward(call, threads);
      },
      py::arg("sizes"), py::arg("x_delta_b_c"), py::arg("rate"), py::arg("skip"), py::arg("state"), py::arg("keep"),
      py::arg("run"), py::arg("out"), py::arg("final_state"), py::arg("boundaries"), py::arg("threads"),
      "Selective state-space scan; see vlm/recurrent.hpp.");
  m.def(
      "ssm_backward",
      [](const std::array<int64_t, 4>& sizes, const std::array<Pair, 4>& x_delta_b_c, uintptr_t rate, uintptr_t skip,
         uintptr_t state, uintptr_t keep, uintptr_t run, uintptr_t boundaries, const Pair& dout, uintptr_t dfinal,
         const std::array<uintptr_t, 7>& gradients, int threads) {
        const auto at = [&](int i) { return address<float>(gradients[i]); };
        const SsmBackward call{ssm_problem(sizes, x_delta_b_c, rate, skip, state, keep, run),
                               address<const float>(boundaries), rows(dout), address<const float>(dfinal),
                               at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
        py::gil_scoped_release release;
        ssm_backward(call, threads);
      },
      py::arg("sizes"), py::arg("x_delta_b_c"), py::arg("rate"), py::arg("skip"), py::arg("state"), py::arg("keep"),
      py::arg("run"), py::arg("boundaries"), py::arg("dout"), py::arg("dfinal"), py::arg("gradients"),
      py::arg("threads"),
      "Gradients of the selective scan, in the order x, delta, rate, b, c, skip, state.");
}

}  // namespace vlm::bindings
