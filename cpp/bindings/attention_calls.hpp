// The calls of exact attention, of the CPU core and of CUDA devices alike: they differ in the arguments that say where
// to compute, `Place` (threads; or workspace and stream), which stand at the end and are named by `names`.
#pragma once

#include <string>
#include <vector>

#include "mask_atoms.hpp"
#include "views.hpp"
#include "vlm/attention.hpp"
#include "vlm/attention_statistics.hpp"

namespace vlm::bindings {

namespace py = pybind11;

using Sizes = std::array<int64_t, 7>;  // batch, query heads, key heads, queries, keys, width, value width

// What a call adds to the plain problem.
struct Extras {
  std::vector<MaskAtom> atoms;
  float softcap = 0.0f;
  std::array<int64_t, 4> relative{};     // address, head stride, rows and columns of the grid
  std::array<int64_t, 2> temperature{};  // address, stride
  double dropout = 0.0;
  uint32_t drop_below = 0;
  uint64_t seed = 0;
  bool half = false;

  explicit Extras(const py::dict& given) {
    for (const auto& [key, value] : given) {
      const std::string name = py::cast<std::string>(key);
      if (name == "atoms")
        atoms = mask_atoms(py::cast<std::vector<Atom>>(value));
      else if (name == "softcap")
        softcap = py::cast<float>(value);
      else if (name == "relative")
        relative = py::cast<std::array<int64_t, 4>>(value);
      else if (name == "temperature")
        temperature = py::cast<std::array<int64_t, 2>>(value);
      else if (name == "dropout")
        dropout = py::cast<double>(value);
      else if (name == "drop_below")
        drop_below = py::cast<uint32_t>(value);
      else if (name == "seed")
        seed = py::cast<uint64_t>(value);
      else if (name == "half")
        half = py::cast<bool>(value);
      else
        throw std::invalid_argument("attention: unknown extra '" + name + "'");
    }
  }
  void give(AttentionProblem& p) const {
    p.atoms = atoms.data();
    p.atom_count = static_cast<int64_t>(atoms.size());
    p.softcap = softcap;
    p.relative = address<const float>(relative[0]);
    p.relative_head_stride = relative[1];
    p.grid_rows = relative[2];
    p.grid_columns = relative[3];
    p.drop_below = drop_below;
    p.keep_share = static_cast<float>(1.0 - dropout);
    p.seed = seed;
    p.half = half;
    p.temperature = address<const float>(temperature[0]);
    p.temperature_stride = temperature[1];
  }
};

// The problem that all calls begin with; the statistics have no values.
inline AttentionProblem attention_problem(const Sizes& n, const View& q, const View& k, const View& v, float scale,
                                          bool causal, int64_t causal_offset, uintptr_t key_mask,
                                          int64_t key_mask_stride, const View& bias, const Extras& extras) {
  AttentionProblem p{n[0],   n[1],   n[2],          n[3],
                     n[4],   n[5],   n[6],          input(q),
                     input(k), input(v), scale,       causal,
                     causal_offset, address<const uint8_t>(key_mask), key_mask_stride, input(bias)};
  extras.give(p);
  return p;
}

template <class... Place, class Run, class... Names>
void define_attention_forward(py::module_& m, Run run, const char* doc, Names... names) {
  m.def(
      "attention_forward",
      [run](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
            int64_t causal_offset, uintptr_t key_mask, int64_t key_mask_stride, const View& bias, const View& out,
            uintptr_t lse, const py::dict& extras, Place... place) {
        const Extras more(extras);
        const AttentionForward call{attention_problem(sizes, q, k, v, scale, causal, causal_offset, key_mask,
                                                      key_mask_stride, bias, more),
                                    output(out), address<float>(lse)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("out"),
      py::arg("lse"), py::arg("extras") = py::dict(), names..., doc);
}

template <class... Place, class Run, class... Names>
void define_attention_backward(py::module_& m, Run run, const char* doc, Names... names) {
  m.def(
      "attention_backward",
      [run](const Sizes& sizes, const View& q, const View& k, const View& v, float scale, bool causal,
            int64_t causal_offset, uintptr_t key_mask, int64_t key_mask_stride, const View& bias, const View& out,
            uintptr_t lse, const View& dout, uintptr_t dlse, const View& dq, const View& dk, const View& dv,
            uintptr_t dbias, const std::array<int64_t, 3>& bias_sizes, uintptr_t drelative, uintptr_t dtemperature,
            const py::dict& extras, Place... place) {
        const Extras more(extras);
        const AttentionBackward call{attention_problem(sizes, q, k, v, scale, causal, causal_offset, key_mask,
                                                       key_mask_stride, bias, more),
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
                                     address<float>(drelative),
                                     address<float>(dtemperature)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("out"),
      py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dbias"),
      py::arg("bias_sizes"), py::arg("drelative") = 0, py::arg("dtemperature") = 0, py::arg("extras") = py::dict(),
      names..., doc);
}

template <class... Place, class Run, class... Names>
void define_attention_column_sums(py::module_& m, Run run, const char* doc, Names... names) {
  m.def(
      "attention_column_sums",
      [run](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
            uintptr_t key_mask, int64_t key_mask_stride, const View& bias, uintptr_t lse, uintptr_t weights,
            uintptr_t sums, const py::dict& extras, Place... place) {
        const Extras more(extras);
        const AttentionColumnSums call{attention_problem(sizes, q, k, {}, scale, causal, causal_offset, key_mask,
                                                         key_mask_stride, bias, more),
                                       address<const float>(lse), address<const float>(weights), address<float>(sums)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("lse"),
      py::arg("weights"), py::arg("sums"), py::arg("extras") = py::dict(), names..., doc);
}

}  // namespace vlm::bindings
