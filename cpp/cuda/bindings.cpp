// The module vlm._native_cuda: device addresses with sizes and strides (in elements), 0 for "not given", and the
// stream. The Python side checks dtype, device and layout. The GIL is released while kernels are launched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "vlm/cuda.hpp"

#ifndef VLM_MODULE
#define VLM_MODULE _native_cuda
#endif

namespace py = pybind11;
using namespace vlm;

namespace {

using View = std::array<uintptr_t, 4>;  // address, strides of batch, heads, rows
using Sizes = std::array<int64_t, 7>;   // batch, query heads, key heads, queries, keys, width, value width
using Flat = std::pair<uintptr_t, int64_t>;  // address, row stride

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

template <class To, class T>
To view(const View& v) {
  return {address<T>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]), static_cast<int64_t>(v[3])};
}
Heads input(const View& v) { return view<Heads, const float>(v); }
MutableHeads output(const View& v) { return view<MutableHeads, float>(v); }

AttentionProblem problem(const Sizes& n, const View& q, const View& k, const View& v, float scale, bool causal,
                         int64_t causal_offset, Flat key_mask, const View& bias) {
  return {n[0],     n[1],     n[2],     n[3],  n[4],   n[5],          n[6],
          input(q), input(k), input(v), scale, causal, causal_offset, address<const uint8_t>(key_mask.first),
          key_mask.second, input(bias)};
}

// Kind, four numbers; address and strides (batch, head, row) of a; address and strides (batch, head) of b.
using Atom = std::array<int64_t, 12>;
using Relative = std::pair<uintptr_t, int64_t>;  // address, head stride

// Mask atoms and a table of relative positions, for a problem that points to them.
struct Extras {
  std::vector<MaskAtom> atoms;
  Relative relative;

  Extras(const std::vector<Atom>& list, Relative table) : relative(table) {
    for (const Atom& t : list)
      atoms.push_back({static_cast<AtomKind>(t[0]), {t[1], t[2], t[3], t[4]},
                       address<const void>(static_cast<uintptr_t>(t[5])), t[6], t[7], t[8],
                       address<const void>(static_cast<uintptr_t>(t[9])), t[10], t[11]});
  }
  AttentionProblem with(AttentionProblem p) const {
    p.atoms = atoms.data();
    p.atom_count = static_cast<int64_t>(atoms.size());
    p.relative = address<const float>(relative.first);
    p.relative_head_stride = relative.second;
    return p;
  }
};

void register_attention(py::module_& m) {
  m.def("attention_shared_bytes", [](const Sizes& sizes) {
    const View none{};
    return cuda::attention_shared_bytes(problem(sizes, none, none, none, 1.0f, false, 0, {0, 0}, none));
  }, py::arg("sizes"), "Shared memory that a block asks for; see vlm/cuda.hpp.");
  m.def("attention_workspace", [](const Sizes& sizes, const std::vector<Atom>& atoms) {
    const View none{};
    const Extras extras(atoms, {0, 0});
    const AttentionProblem p = extras.with(problem(sizes, none, none, none, 1.0f, false, 0, {0, 0}, none));
    return std::pair(cuda::attention_forward_workspace(p), cuda::attention_backward_workspace(p));
  }, py::arg("sizes"), py::arg("atoms"), "Bytes of workspace of the forward and of the backward pass.");
  m.def("device_shared_bytes", &cuda::device_shared_bytes, py::arg("device"),
        "Shared memory that a block may ask for.");
  m.def(
      "attention_forward",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
         int64_t causal_offset, Flat key_mask, const View& bias, const View& out, uintptr_t lse, uintptr_t stream,
         const std::vector<Atom>& atoms, Relative relative, uintptr_t workspace) {
        const Extras extras(atoms, relative);
        const cuda::AttentionForward call{
            extras.with(problem(sizes, q, k, v, scale, causal, causal_offset, key_mask, bias)), output(out),
            address<float>(lse)};
        py::gil_scoped_release release;
        cuda::attention_forward(call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("bias"), py::arg("out"), py::arg("lse"), py::arg("stream"),
      py::arg("atoms") = std::vector<Atom>{}, py::arg("relative") = Relative{0, 0}, py::arg("workspace") = 0,
      "Exact attention in float32.");
  m.def(
      "attention_forward_bf16",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
         int64_t causal_offset, Flat key_mask, const View& bias, const View& out, uintptr_t lse, uintptr_t stream,
         const std::vector<Atom>& atoms, Relative relative, uintptr_t workspace) {
        const Extras extras(atoms, relative);
        const View none{};
        const cuda::AttentionForwardBf16 call{
            extras.with(problem(sizes, none, none, none, scale, causal, causal_offset, key_mask, bias)),
            view<cuda::HalfHeads, const uint16_t>(q), view<cuda::HalfHeads, const uint16_t>(k),
            view<cuda::HalfHeads, const uint16_t>(v), view<cuda::MutableHalfHeads, uint16_t>(out), address<float>(lse)};
        py::gil_scoped_release release;
        cuda::attention_forward_bf16(call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("bias"), py::arg("out"), py::arg("lse"), py::arg("stream"),
      py::arg("atoms") = std::vector<Atom>{}, py::arg("relative") = Relative{0, 0}, py::arg("workspace") = 0,
      "Exact attention of bf16 on tensor cores.");
  m.def(
      "attention_backward",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
         int64_t causal_offset, Flat key_mask, const View& bias, const View& out, uintptr_t lse, const View& dout,
         uintptr_t dlse, const View& dq, const View& dk, const View& dv, uintptr_t dbias,
         const std::array<int64_t, 3>& bias_sizes, uintptr_t workspace, uintptr_t stream,
         const std::vector<Atom>& atoms, Relative relative,
         uintptr_t drelative) {
        const Extras extras(atoms, relative);
        const AttentionProblem plain = problem(sizes, q, k, v, scale, causal, causal_offset, key_mask, bias);
        const cuda::AttentionBackward call{extras.with(plain),
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
                                           bias_sizes[2],
                                           address<float>(drelative)};
        py::gil_scoped_release release;
        cuda::attention_backward(call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("bias"), py::arg("out"), py::arg("lse"), py::arg("dout"),
      py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"), py::arg("bias_sizes"),
      py::arg("workspace"), py::arg("stream"), py::arg("atoms") = std::vector<Atom>{},
      py::arg("relative") = Relative{0, 0}, py::arg("drelative") = 0,
      "Gradients of exact attention; see attention_workspace.");
}

cuda::PairLoss loss_from_name(const std::string& name) {
  if (name == "softmax") return cuda::PairLoss::softmax;
  if (name == "sigmoid") return cuda::PairLoss::sigmoid;
  throw py::value_error("unknown pair loss '" + name + "'; expected softmax or sigmoid");
}

cuda::PairProblem problem(const std::array<int64_t, 3>& sizes, Flat x, Flat y, float scale, float bias,
                          uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          {address<const float>(x.first), x.second},
          {address<const float>(y.first), y.second},
          scale,
          bias,
          address<const int64_t>(row_ids),
          address<const int64_t>(column_ids),
          row_offset};
}

void register_contrastive(py::module_& m) {
  m.def("pair_workspace", [](const std::array<int64_t, 3>& sizes) {
    return cuda::pair_workspace(problem(sizes, {0, 0}, {0, 0}, 1.0f, 0.0f, 0, 0, 0));
  }, py::arg("sizes"), "Bytes of workspace for rows, columns, width.");
  m.def(
      "pair_forward",
      [](const std::string& loss, const std::array<int64_t, 3>& sizes, Flat x, Flat y, float scale, float bias,
         uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_values, uintptr_t column_values,
         uintptr_t row_lse, uintptr_t column_lse, uintptr_t workspace, uintptr_t stream) {
        const cuda::PairLoss kind = loss_from_name(loss);
        const cuda::PairForward call{problem(sizes, x, y, scale, bias, row_ids, column_ids, row_offset),
                                     address<float>(row_values), address<float>(column_values), address<float>(row_lse),
                                     address<float>(column_lse)};
        py::gil_scoped_release release;
        cuda::pair_forward(kind, call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("loss"), py::arg("sizes"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("bias"),
      py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"), py::arg("row_values"), py::arg("column_values"),
      py::arg("row_lse"), py::arg("column_lse"), py::arg("workspace"), py::arg("stream"),
      "Values of a contrastive loss by row and by column.");
  m.def(
      "pair_backward",
      [](const std::string& loss, const std::array<int64_t, 3>& sizes, Flat x, Flat y, float scale, float bias,
         uintptr_t row_ids, uintptr_t column_ids, int64_t row_offset, uintptr_t row_lse, uintptr_t column_lse,
         uintptr_t row_gradient, uintptr_t column_gradient, Flat dx, Flat dy, uintptr_t sums, uintptr_t workspace,
         uintptr_t stream) {
        const cuda::PairLoss kind = loss_from_name(loss);
        const cuda::PairBackward call{problem(sizes, x, y, scale, bias, row_ids, column_ids, row_offset),
                                      address<const float>(row_lse),
                                      address<const float>(column_lse),
                                      address<const float>(row_gradient),
                                      address<const float>(column_gradient),
                                      {address<float>(dx.first), dx.second},
                                      {address<float>(dy.first), dy.second},
                                      address<double>(sums),
                                      address<double>(sums) + 1};
        py::gil_scoped_release release;
        cuda::pair_backward(kind, call, address<void>(workspace), address<void>(stream));
      },
      py::kw_only(), py::arg("loss"), py::arg("sizes"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("bias"),
      py::arg("row_ids"), py::arg("column_ids"), py::arg("row_offset"), py::arg("row_lse"), py::arg("column_lse"),
      py::arg("row_gradient"), py::arg("column_gradient"), py::arg("dx"), py::arg("dy"), py::arg("sums"),
      py::arg("workspace"), py::arg("stream"),
      "Gradients of a contrastive loss; `sums` are two doubles, for log(scale) and bias.");
}

}  // namespace

PYBIND11_MODULE(VLM_MODULE, m) {
  m.doc() = "Operators of vlm on CUDA devices: device addresses in and out.";
  register_attention(m);
  register_contrastive(m);
}
