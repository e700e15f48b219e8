#include "vlm/float_products.hpp"
#include "vlm/half_products.hpp"
#include "vlm/vocabulary.hpp"

#include <string>

#include "views.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

Divergence divergence_from_name(const std::string& name) {
  static const std::array<const char*, 6> names{"forward", "reverse", "symmetric", "js", "skew", "tv"};
  for (std::size_t k = 0; k < names.size(); ++k)
    if (name == names[k]) return static_cast<Divergence>(k);
  throw py::value_error("unknown divergence '" + name + "'; expected forward, reverse, symmetric, js, skew or tv");
}

HalfMatrix half(const Block& b) { return {address<const uint16_t>(b.first), b.second}; }

}  // namespace

void register_vocabulary(py::module_& m) {
  m.def(
      "cross_entropy_rows",
      [](int64_t rows, int64_t ids, Block chunk, uintptr_t bias, uintptr_t labels, uintptr_t factors, float smoothing,
         float z_loss, float softcap, bool gradient, uintptr_t loss, uintptr_t log_p, uintptr_t lse, int threads) {
        const CrossEntropyRows call{rows,
                                    ids,
                                    output(chunk),
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
                                  output(student),
                                  output(teacher),
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
  m.def(
      "product_rows",
      [](int64_t rows, int64_t ids, int64_t width, Block hidden, Block weight, Block z, int threads) {
        const HalfProduct call{rows, ids, width, half(hidden), half(weight), output(z)};
        py::gil_scoped_release release;
        product_rows(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("width"), py::arg("hidden"), py::arg("weight"), py::arg("z"),
      py::arg("threads"), "float32 products of bfloat16 rows; see vlm/half_products.hpp.");
  m.def(
      "product_gradients",
      [](int64_t rows, int64_t ids, int64_t width, Block hidden, Block weight, Block gradient, Block d_hidden,
         Block d_weight, int threads) {
        const HalfProductGradients call{rows,
                                        ids,
                                        width,
                                        half(hidden),
                                        half(weight),
                                        input(gradient),
                                        output(d_hidden),
                                        output(d_weight)};
        py::gil_scoped_release release;
        product_gradients(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("width"), py::arg("hidden"), py::arg("weight"), py::arg("gradient"),
      py::arg("d_hidden"), py::arg("d_weight"), py::arg("threads"),
      "Gradients of `product_rows`; adds to that of the weight.");
  m.def(
      "float_product_rows",
      [](int64_t rows, int64_t ids, int64_t width, Block hidden, Block weight, Block z, int threads) {
        const FloatProduct call{rows, ids, width, input(hidden), input(weight), output(z)};
        py::gil_scoped_release release;
        product_rows(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("width"), py::arg("hidden"), py::arg("weight"), py::arg("z"),
      py::arg("threads"), "Products of float32 rows; see vlm/float_products.hpp.");
  m.def(
      "float_product_gradients",
      [](int64_t rows, int64_t ids, int64_t width, Block hidden, Block weight, Block gradient, Block d_hidden,
         Block d_weight, int threads) {
        const FloatProductGradients call{rows,
                                         ids,
                                         width,
                                         input(hidden),
                                         input(weight),
                                         input(gradient),
                                         output(d_hidden),
                                         output(d_weight)};
        py::gil_scoped_release release;
        product_gradients(call, threads);
      },
      py::arg("rows"), py::arg("ids"), py::arg("width"), py::arg("hidden"), py::arg("weight"), py::arg("gradient"),
      py::arg("d_hidden"), py::arg("d_weight"), py::arg("threads"),
      "Gradients of `float_product_rows`; adds to that of the weight.");
}

}  // namespace vlm::bindings
