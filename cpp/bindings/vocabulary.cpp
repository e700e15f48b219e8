#include "vlm/vocabulary.hpp"

#include <array>
#include <string>
#include <utility>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

Divergence divergence_from_name(const std::string& name) {
  static const std::array<const char*, 6> names{"forward", "reverse", "symmetric", "js", "skew", "tv"};
  for (std::size_t k = 0; k < names.size(); ++k)
    if (name == names[k]) return static_cast<Divergence>(k);
  throw py::value_error("unknown divergence '" + name + "'; expected forward, reverse, symmetric, js, skew or tv");
}

using Block = std::pair<uintptr_t, int64_t>;  // address, row stride

}  // namespace

void register_vocabulary(py::module_& m) {
  m.def(
      "cross_entropy_rows",
      [](int64_t rows, int64_t ids, Block chunk, uintptr_t bias, uintptr_t labels, uintptr_t factors, float smoothing,
         float z_loss, float softcap, bool gradient, uintptr_t loss, uintptr_t log_p, uintptr_t lse, int threads) {
        const CrossEntropyRows call{rows,
                                    ids,
                                    {address<float>(chunk.first), chunk.second},
                                    address<const float>(bias),
                                    address<const int64_t>(labels),
                                    address<const float>(factors),
                                    smoothing,
                                    z_loss,
                                    softcap,
                                    gradient,
                                    address<float>(loss),
                                    address<float>(log_p),
                                    address<float>(lse)};
        py::gil_scoped_release release;
        cross_entropy_rows(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("chunk"), py::arg("bias"), py::arg("labels"), py::arg("factors"),
      py::arg("smoothing"), py::arg("z_loss"), py::arg("softcap"), py::arg("gradient"), py::arg("loss"),
      py::arg("log_p"), py::arg("lse"), py::arg("threads"),
      "Cross-entropy of a chunk of products, which becomes its gradient; see vlm/vocabulary.hpp.");
  m.def(
      "divergence_rows",
      [](int64_t rows, int64_t ids, Block student, Block teacher, uintptr_t factors, const std::string& kind,
         float temperature, float mix, bool gradient, uintptr_t value, int threads) {
        const DivergenceRows call{rows,
                                  ids,
                                  {address<float>(student.first), student.second},
                                  {address<float>(teacher.first), teacher.second},
                                  address<const float>(factors),
                                  divergence_from_name(kind),
                                  temperature,
                                  mix,
                                  gradient,
                                  address<float>(value)};
        py::gil_scoped_release release;
        divergence_rows(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("student"), py::arg("teacher"), py::arg("factors"), py::arg("kind"),
      py::arg("temperature"), py::arg("mix"), py::arg("gradient"), py::arg("value"), py::arg("threads"),
      "Divergence of two chunks of logits; the student's becomes the gradient.");
}

}  // namespace vlm::bindings
