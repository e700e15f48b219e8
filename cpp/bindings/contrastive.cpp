#include "vlm/contrastive.hpp"

#include <string>
#include <utility>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

PairLoss loss_from_name(const std::string& name) {
  if (name == "softmax") return PairLoss::softmax;
  if (name == "sigmoid") return PairLoss::sigmoid;
  throw py::value_error("unknown pair loss '" + name + "'; expected softmax or sigmoid");
}

using Input = std::pair<uintptr_t, int64_t>;  // address, row stride

PairProblem problem(int64_t rows, int64_t columns, int64_t width, Input x, Input y, float scale, float bias,
                    uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset) {
  return {rows,
          columns,
          width,
          {address<const float>(x.first), x.second},
          {address<const float>(y.first), y.second},
          scale,
          bias,
          address<const int64_t>(row_ids),
          address<const int64_t>(column_ids),
          row_offset};
}

}  // namespace

void register_contrastive(py::module_& m) {
  m.def(
      "pair_forward",
      [](const std::string& loss, int64_t rows, int64_t columns, int64_t width, Input x, Input y, float scale,
         float bias, uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_values,
         uintptr_t column_values, uintptr_t row_lse, uintptr_t column_lse, int threads) {
        const PairLoss kind = loss_from_name(loss);
        const PairForward call{
            problem(rows, columns, width, x, y, scale, bias, row_ids, column_ids, row_offset),
            address<float>(row_values), address<float>(column_values), address<float>(row_lse),
            address<float>(column_lse)};
        py::gil_scoped_release release;
        pair_forward(kind, call, threads);
      },
      py::arg("loss"), py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("x"), py::arg("y"),
      py::arg("scale"), py::arg("bias"), py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"),
      py::arg("row_values"), py::arg("column_values"), py::arg("row_lse"), py::arg("column_lse"), py::arg("threads"),
      "Values of a contrastive loss by row and by column; see vlm/contrastive.hpp.");
  m.def(
      "pair_backward",
      [](const std::string& loss, int64_t rows, int64_t columns, int64_t width, Input x, Input y, float scale,
         float bias, uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_lse,
         uintptr_t column_lse, uintptr_t row_gradient, uintptr_t column_gradient, Input dx, Input dy, int threads) {
        const PairLoss kind = loss_from_name(loss);
        double dlog_scale = 0.0, dbias = 0.0;
        const PairBackward call{
            problem(rows, columns, width, x, y, scale, bias, row_ids, column_ids, row_offset),
            address<const float>(row_lse),
            address<const float>(column_lse),
            address<const float>(row_gradient),
            address<const float>(column_gradient),
            {address<float>(dx.first), dx.second},
            {address<float>(dy.first), dy.second},
            &dlog_scale,
            &dbias};
        {
          py::gil_scoped_release release;
          pair_backward(kind, call, threads);
        }
        return std::make_pair(dlog_scale, dbias);
      },
      py::arg("loss"), py::arg("rows"), py::arg("columns"), py::arg("width"), py::arg("x"), py::arg("y"),
      py::arg("scale"), py::arg("bias"), py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"),
      py::arg("row_lse"), py::arg("column_lse"), py::arg("row_gradient"), py::arg("column_gradient"), py::arg("dx"),
      py::arg("dy"), py::arg("threads"),
      "Gradients of a contrastive loss; writes dx and dy, returns those of log(scale) and bias.");
}

}  // namespace vlm::bindings
