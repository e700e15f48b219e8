#include <string>

#include "bindings.hpp"
#include "bindings/views.hpp"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

namespace py = pybind11;
using namespace bindings;

namespace {

PairLoss loss_from_name(const std::string& name) {
  if (name == "softmax") return PairLoss::softmax;
  if (name == "sigmoid") return PairLoss::sigmoid;
  throw py::value_error("unknown pair loss '" + name + "'; expected softmax or sigmoid");
}

PairProblem problem(const std::array<int64_t, 3>& sizes, Block x, Block y, float scale, float bias,
                    uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          input(x),
          input(y),
          scale,
          bias,
          address<const int64_t>(row_ids),
          address<const int64_t>(column_ids),
          row_offset};
}

}  // namespace

void register_contrastive(py::module_& m) {
  m.def("pair_workspace", [](const std::array<int64_t, 3>& sizes) {
    return pair_workspace(problem(sizes, {0, 0}, {0, 0}, 1.0f, 0.0f, 0, 0, 0));
  }, py::arg("sizes"), "Bytes of workspace for rows, columns, width.");
  m.def(
      "pair_forward",
      [](const std::string& loss, const std::array<int64_t, 3>& sizes, Block x, Block y, float scale, float bias,
         uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_values, uintptr_t column_values,
         uintptr_t row_lse, uintptr_t column_lse, uintptr_t workspace, uintptr_t stream) {
        const PairLoss kind = loss_from_name(loss);
        const PairForward call{problem(sizes, x, y, scale, bias, row_ids, column_ids, row_offset),
                               address<float>(row_values), address<float>(column_values), address<float>(row_lse),
                               address<float>(column_lse)};
        py::gil_scoped_release release;
        pair_forward(kind, call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("loss"), py::arg("sizes"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("bias"),
      py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"), py::arg("row_values"), py::arg("column_values"),
      py::arg("row_lse"), py::arg("column_lse"), py::arg("workspace"), py::arg("stream"),
      "Values of a contrastive loss by row and by column.");
  m.def(
      "pair_backward",
      [](const std::string& loss, const std::array<int64_t, 3>& sizes, Block x, Block y, float scale, float bias,
         uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_lse, uintptr_t column_lse,
         uintptr_t row_gradient, uintptr_t column_gradient, Block dx, Block dy, uintptr_t sums, uintptr_t workspace,
         uintptr_t stream) {
        const PairLoss kind = loss_from_name(loss);
        const PairBackward call{problem(sizes, x, y, scale, bias, row_ids, column_ids, row_offset),
                                address<const float>(row_lse),
                                address<const float>(column_lse),
                                address<const float>(row_gradient),
                                address<const float>(column_gradient),
                                output(dx),
                                output(dy),
                                address<double>(sums),
                                address<double>(sums) + 1};
        py::gil_scoped_release release;
        pair_backward(kind, call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("loss"), py::arg("sizes"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("bias"),
      py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"), py::arg("row_lse"), py::arg("column_lse"),
      py::arg("row_gradient"), py::arg("column_gradient"), py::arg("dx"), py::arg("dy"), py::arg("sums"),
      py::arg("workspace"), py::arg("stream"),
      "Gradients of a contrastive loss; `sums` are two doubles, for log(scale) and bias.");
}

}  // namespace vlm::cuda
