#include "vlm/late_interaction.hpp"

#include <tuple>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

// address, samples, tokens, sample stride, token stride, address of the mask
using Tokens = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, uintptr_t>;

TokenSet token_set(const Tokens& t) {
  return {address<const float>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t),
          address<const uint8_t>(std::get<5>(t))};
}

}  // namespace

void register_late_interaction(py::module_& m) {
  m.def(
      "late_forward",
      [](const Tokens& rows, const Tokens& columns, int64_t width, bool mean, uintptr_t row_values,
         uintptr_t column_values, uintptr_t found, int threads) {
        const LateForward call{{token_set(rows), token_set(columns), width, mean},
                               address<float>(row_values),
                               address<float>(column_values),
                               address<uint16_t>(found)};
        py::gil_scoped_release release;
        late_forward(call, threads);
      },
      py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("mean"), py::arg("row_values"),
      py::arg("column_values"), py::arg("found"), py::arg("threads"),
      "Similarities by best-matching tokens; see vlm/late_interaction.hpp.");
  m.def(
      "late_backward",
      [](const Tokens& rows, const Tokens& columns, int64_t width, bool mean, uintptr_t row_gradient,
         uintptr_t column_gradient, uintptr_t found, uintptr_t drows, uintptr_t dcolumns, int threads) {
        const LateBackward call{{token_set(rows), token_set(columns), width, mean},
                                address<const float>(row_gradient),
                                address<const float>(column_gradient),
                                address<const uint16_t>(found),
                                address<float>(drows),
                                address<float>(dcolumns)};
        py::gil_scoped_release release;
        late_backward(call, threads);
      },
      py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("mean"), py::arg("row_gradient"),
      py::arg("column_gradient"), py::arg("found"), py::arg("drows"), py::arg("dcolumns"), py::arg("threads"),
      "Gradients of the tokens.");
}

}  // namespace vlm::bindings
