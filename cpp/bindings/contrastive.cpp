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

// What the Python side says by name, so that neither list of arguments can slip.
struct Problem {
  PairProblem value{};

  explicit Problem(const py::dict& d) {
    const auto integer = [&](const char* name) { return d[name].cast<int64_t>(); };
    const auto number = [&](const char* name) { return d[name].cast<float>(); };
    const auto matrix = [&](const char* name) {
      const Input input = d[name].cast<Input>();
      return Matrix{address<const float>(input.first), input.second};
    };
    const auto ids = [&](const char* name) { return address<const int64_t>(d[name].cast<uintptr_t>()); };
    const auto numbers = [&](const char* name) { return address<const float>(d[name].cast<uintptr_t>()); };
    value.rows = integer("rows");
    value.columns = integer("columns");
    value.width = integer("width");
    value.x = matrix("x");
    value.y = matrix("y");
    value.half = d["half"].cast<bool>();
    value.scale = number("scale");
    value.bias = number("bias");
    value.row_ids = ids("row_ids");
    value.column_ids = ids("column_ids");
    value.row_offset = integer("row_offset");
    value.row_excluded = ids("row_excluded");
    value.column_excluded = ids("column_excluded");
    value.decoupled = d["decoupled"].cast<bool>();
    value.full = d["full"].cast<bool>();
    value.positive_label = numbers("positive_label");
    value.negative_label = numbers("negative_label");
    value.negative_weight = number("negative_weight");
    value.teacher = {integer("teacher_width"), matrix("teacher_x"),     matrix("teacher_y"), number("teacher_scale"),
                     number("teacher_bias"),   number("teacher_share"), number("similar")};
  }
};

}  // namespace

void register_contrastive(py::module_& m) {
  m.def(
      "pair_forward",
      [](const std::string& loss, const py::dict& problem, uintptr_t rows, uintptr_t columns, int threads) {
        const PairLoss kind = loss_from_name(loss);
        const PairForward call{Problem(problem).value, address<float>(rows), address<float>(columns)};
        py::gil_scoped_release release;
        pair_forward(kind, call, threads);
      },
      py::arg("loss"), py::arg("problem"), py::arg("rows"), py::arg("columns"), py::arg("threads"),
      "Statistics of a contrastive loss by row and by column; see vlm/contrastive.hpp.");
  m.def(
      "pair_backward",
      [](const std::string& loss, const py::dict& problem, uintptr_t rows, uintptr_t columns, uintptr_t row_gradient,
         uintptr_t column_gradient, Input dx, Input dy, int threads) {
        const PairLoss kind = loss_from_name(loss);
        double dlog_scale = 0.0, dbias = 0.0;
        const PairBackward call{Problem(problem).value,
                                address<const float>(rows),
                                address<const float>(columns),
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
      py::arg("loss"), py::arg("problem"), py::arg("rows"), py::arg("columns"), py::arg("row_gradient"),
      py::arg("column_gradient"), py::arg("dx"), py::arg("dy"), py::arg("threads"),
      "Gradients of a contrastive loss; writes dx and dy, returns those of log(scale) and bias.");
}

}  // namespace vlm::bindings
