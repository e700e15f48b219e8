#include "bindings.hpp"
#include "bindings/views.hpp"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

namespace py = pybind11;
using namespace bindings;

namespace {

using Sizes = std::array<int64_t, 3>;    // rows, ids, width
using Options = std::array<float, 3>;    // smoothing, weight of the squared log normaliser, cap

VocabularyProblem problem(const Sizes& n, Block hidden, Block weight, uintptr_t bias, uintptr_t labels,
                          const Options& options) {
  return {n[0],
          n[1],
          n[2],
          input(hidden),
          input(weight),
          address<const float>(bias),
          address<const int64_t>(labels),
          options[0],
          options[1],
          options[2]};
}

}  // namespace

void register_vocabulary(py::module_& m) {
  m.def("vocabulary_workspace", [](const Sizes& sizes) {
    return vocabulary_workspace(problem(sizes, {}, {}, 0, 0, {}));
  }, py::arg("sizes"), "Bytes of workspace for rows, ids, width.");
  m.def(
      "vocabulary_forward",
      [](const Sizes& sizes, Block hidden, Block weight, uintptr_t bias, uintptr_t labels, const Options& options,
         uintptr_t loss, uintptr_t log_p, uintptr_t lse, uintptr_t workspace, uintptr_t stream) {
        const VocabularyForward call{problem(sizes, hidden, weight, bias, labels, options), address<float>(loss),
                                     address<float>(log_p), address<float>(lse)};
        py::gil_scoped_release release;
        vocabulary_forward(call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("labels"),
      py::arg("options"), py::arg("loss"), py::arg("log_p"), py::arg("lse"), py::arg("workspace"), py::arg("stream"),
      "Cross-entropy of rows over the vocabulary; see vlm/cuda.hpp.");
  m.def(
      "vocabulary_backward",
      [](const Sizes& sizes, Block hidden, Block weight, uintptr_t bias, uintptr_t labels, const Options& options,
         uintptr_t lse, uintptr_t factors, Block dhidden, Block dweight, uintptr_t dbias, uintptr_t stream) {
        const VocabularyBackward call{problem(sizes, hidden, weight, bias, labels, options),
                                      address<const float>(lse),
                                      address<const float>(factors),
                                      output(dhidden),
                                      output(dweight),
                                      address<float>(dbias)};
        py::gil_scoped_release release;
        vocabulary_backward(call, address<void>(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("labels"),
      py::arg("options"), py::arg("lse"), py::arg("factors"), py::arg("dhidden"), py::arg("dweight"), py::arg("dbias"),
      py::arg("stream"), "Gradients of the sum of `factors` times the losses.");
}

}  // namespace vlm::cuda
