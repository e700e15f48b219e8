#include "vlm/attention.hpp"

#include <array>
#include <pybind11/stl.h>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

using Sizes = std::array<int64_t, 7>;  // batch, query heads, key heads, queries, keys, width, value width
using View = std::array<uintptr_t, 4>;  // address, then batch, head and row stride

Heads input(const View& v) {
  return {address<const float>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]),
          static_cast<int64_t>(v[3])};
}
MutableHeads output(const View& v) {
  return {address<float>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]), static_cast<int64_t>(v[3])};
}

AttentionProblem problem(const Sizes& n, const View& q, const View& k, const View& v, float scale, bool causal,
                         int64_t causal_offset, uintptr_t key_mask, int64_t key_mask_stride, const View& bias) {
  return {n[0],   n[1],   n[2],          n[3],
          n[4],   n[5],   n[6],          input(q),
          input(k), input(v), scale,       causal,
          causal_offset, address<const uint8_t>(key_mask), key_mask_stride, input(bias)};
}

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
         int64_t causal_offset, uintptr_t key_mask, int64_t key_mask_stride, const View& bias, const View& out,
         uintptr_t lse, int threads) {
        const AttentionForward call{
            problem(sizes, q, k, v, scale, causal, causal_offset, key_mask, key_mask_stride, bias), output(out),
            address<float>(lse)};
        py::gil_scoped_release release;
        attention_forward(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("out"),
      py::arg("lse"), py::arg("threads"), "Exact attention; see vlm/attention.hpp.");
  m.def(
      "attention_backward",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
         int64_t causal_offset, uintptr_t key_mask, int64_t key_mask_stride, const View& bias, const View& out,
         uintptr_t lse, const View& dout, uintptr_t dlse, const View& dq, const View& dk, const View& dv,
         uintptr_t dbias, const std::array<int64_t, 3>& bias_sizes, int threads) {
        const AttentionBackward call{
            problem(sizes, q, k, v, scale, causal, causal_offset, key_mask, key_mask_stride, bias),
            input(out),
            address<const float>(lse),
            input(dout),
            address<const float>(dlse),
            output(dq),
            output(dk),
            output(dv),
            address<float>(dbias),
            bias_sizes[0],
            bias_sizes[1],
            bias_sizes[2]};
        py::gil_scoped_release release;
        attention_backward(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("out"),
      py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"),
      py::arg("bias_sizes"), py::arg("threads"), "Gradients of exact attention.");
}

}  // namespace vlm::bindings
