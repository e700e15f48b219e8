#include "vlm/window_attention.hpp"

#include <array>
#include <pybind11/stl.h>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

// maps, rows, columns, heads, head width, window rows and columns, shift rows and columns
using Sizes = std::array<int64_t, 9>;
using View = std::array<uintptr_t, 4>;  // address, then map, row and column stride

Heads input(const View& v) {
  return {address<const float>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]),
          static_cast<int64_t>(v[3])};
}

WindowAttentionProblem problem(const Sizes& n, const View& qkv, uintptr_t tau, uintptr_t bias_table) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], input(qkv), address<const float>(tau),
          address<const float>(bias_table)};
}

}  // namespace

void register_window_attention(py::module_& m) {
  m.def(
      "window_attention_forward",
      [](const Sizes& sizes, const View& qkv, uintptr_t tau, uintptr_t bias_table, uintptr_t out, uintptr_t lse,
         int threads) {
        const WindowAttentionForward call{problem(sizes, qkv, tau, bias_table), address<float>(out),
                                          address<float>(lse)};
        py::gil_scoped_release release;
        window_attention_forward(call, threads);
      },
      py::arg("sizes"), py::arg("qkv"), py::arg("tau"), py::arg("bias_table"), py::arg("out"), py::arg("lse"),
      py::arg("threads"), "Windowed cosine attention; see vlm/window_attention.hpp.");
  m.def(
      "window_attention_backward",
      [](const Sizes& sizes, const View& qkv, uintptr_t tau, uintptr_t bias_table, uintptr_t out, uintptr_t lse,
         const View& dout, uintptr_t dqkv, uintptr_t dtau, uintptr_t dbias_table, int threads) {
        const WindowAttentionBackward call{problem(sizes, qkv, tau, bias_table),
                                           address<const float>(out),
                                           address<const float>(lse),
                                           input(dout),
                                           address<float>(dqkv),
                                           address<float>(dtau),
                                           address<float>(dbias_table)};
        py::gil_scoped_release release;
        window_attention_backward(call, threads);
      },
      py::arg("sizes"), py::arg("qkv"), py::arg("tau"), py::arg("bias_table"), py::arg("out"), py::arg("lse"),
      py::arg("dout"), py::arg("dqkv"), py::arg("dtau"), py::arg("dbias_table"), py::arg("threads"),
      "Gradients of windowed cosine attention.");
}

}  // namespace vlm::bindings
