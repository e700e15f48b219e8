#include "vlm/alignment.hpp"

#include <tuple>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

using Costs = std::tuple<uintptr_t, int64_t, int64_t>;  // address, batch stride, row stride

AlignmentProblem problem(int64_t batch, int64_t rows, int64_t columns, Costs cost, uintptr_t row_lengths,
                         uintptr_t column_lengths, float gamma) {
  return {batch,
          rows,
          columns,
          address<const float>(std::get<0>(cost)),
          std::get<1>(cost),
          std::get<2>(cost),
          address<const int64_t>(row_lengths),
          address<const int64_t>(column_lengths),
          gamma};
}

}  // namespace

void register_alignment(py::module_& m) {
  m.def(
      "alignment_forward",
      [](int64_t batch, int64_t rows, int64_t columns, Costs cost, uintptr_t row_lengths, uintptr_t column_lengths,
         float gamma, uintptr_t values, int threads) {
        const AlignmentForward call{problem(batch, rows, columns, cost, row_lengths, column_lengths, gamma),
                                    address<float>(values)};
        py::gil_scoped_release release;
        alignment_forward(call, threads);
      },
      py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("cost"), py::arg("row_lengths"),
      py::arg("column_lengths"), py::arg("gamma"), py::arg("values"), py::arg("threads"),
      "Soft or hard DTW of each pair of sequences; see vlm/alignment.hpp.");
  m.def(
      "alignment_backward",
      [](int64_t batch, int64_t rows, int64_t columns, Costs cost, uintptr_t row_lengths, uintptr_t column_lengths,
         float gamma, uintptr_t upstream, uintptr_t gradient, int threads) {
        const AlignmentBackward call{problem(batch, rows, columns, cost, row_lengths, column_lengths, gamma),
                                     address<const float>(upstream), address<float>(gradient)};
        py::gil_scoped_release release;
        alignment_backward(call, threads);
      },
      py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("cost"), py::arg("row_lengths"),
      py::arg("column_lengths"), py::arg("gamma"), py::arg("upstream"), py::arg("gradient"), py::arg("threads"),
      "Gradient of the costs; writes all of it.");
}

}  // namespace vlm::bindings
