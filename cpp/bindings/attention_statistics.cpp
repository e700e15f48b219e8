#include "vlm/attention_statistics.hpp"

#include <array>
#include <pybind11/stl.h>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "mask_atoms.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

using Sizes = std::array<int64_t, 6>;   // batch, query heads, key heads, queries, keys, width
using View = std::array<uintptr_t, 4>;  // address, then batch, head and row stride
using Part = std::pair<View, uintptr_t>;  // output and lse

Heads input(const View& v) {
  return {address<const float>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]),
          static_cast<int64_t>(v[3])};
}
MutableHeads output(const View& v) {
  return {address<float>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]), static_cast<int64_t>(v[3])};
}

// What a call adds to the plain problem.
struct Extras {
  std::vector<MaskAtom> atoms;
  float softcap;
  std::array<int64_t, 4> relative;  // address, head stride, rows and columns of the grid
  Extras(const std::vector<Atom>& list, float cap, const std::array<int64_t, 4>& bias)
      : atoms(mask_atoms(list)), softcap(cap), relative(bias) {}
};

// Fields that are not named here are zero: no values, no dropout, plain products.
AttentionProblem problem(const Sizes& n, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
                         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, const Extras& extras) {
  AttentionProblem p{};
  p.batch = n[0];
  p.query_heads = n[1];
  p.key_heads = n[2];
  p.queries = n[3];
  p.keys = n[4];
  p.width = n[5];
  p.q = input(q);
  p.k = input(k);
  p.scale = scale;
  p.causal = causal;
  p.causal_offset = causal_offset;
  p.key_mask = address<const uint8_t>(key_mask);
  p.key_mask_stride = key_mask_stride;
  p.bias = input(bias);
  p.atoms = extras.atoms.data();
  p.atom_count = static_cast<int64_t>(extras.atoms.size());
  p.softcap = extras.softcap;
  p.relative = address<const float>(extras.relative[0]);
  p.relative_head_stride = extras.relative[1];
  p.grid_rows = extras.relative[2];
  p.grid_columns = extras.relative[3];
  return p;
}

struct Parts {
  std::vector<Heads> outs;
  std::vector<const float*> lses;
  explicit Parts(const std::vector<Part>& parts) {
    for (const Part& part : parts) {
      outs.push_back(input(part.first));
      lses.push_back(address<const float>(part.second));
    }
  }
};

}  // namespace

void register_attention_statistics(py::module_& m) {
  m.def(
      "attention_column_sums",
      [](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, uintptr_t lse, uintptr_t weights,
         uintptr_t sums, int threads, const std::vector<Atom>& atoms, float softcap,
         const std::array<int64_t, 4>& relative) {
        const Extras more(atoms, softcap, relative);
        const AttentionColumnSums call{
            problem(sizes, q, k, scale, causal, causal_offset, key_mask, key_mask_stride, bias, more),
            address<const float>(lse), address<const float>(weights), address<float>(sums)};
        py::gil_scoped_release release;
        attention_column_sums(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"), py::arg("causal_offset"),
      py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("lse"), py::arg("weights"),
      py::arg("sums"), py::arg("threads"), py::arg("atoms") = std::vector<Atom>{},
      py::arg("softcap") = 0.0f, py::arg("relative") = std::array<int64_t, 4>{},
      "Weighted column sums of the attention matrix; see vlm/attention_statistics.hpp.");
  m.def(
      "attention_row_statistics",
      [](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, uintptr_t lse, uintptr_t entropy,
         uintptr_t best, int threads, const std::vector<Atom>& atoms, float softcap,
         const std::array<int64_t, 4>& relative) {
        const Extras more(atoms, softcap, relative);
        const AttentionRowStatistics call{
            problem(sizes, q, k, scale, causal, causal_offset, key_mask, key_mask_stride, bias, more),
            address<float>(lse),
            address<float>(entropy), address<int64_t>(best)};
        py::gil_scoped_release release;
        attention_row_statistics(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"), py::arg("causal_offset"),
      py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("lse"), py::arg("entropy"),
      py::arg("best"), py::arg("threads"), py::arg("atoms") = std::vector<Atom>{},
      py::arg("softcap") = 0.0f, py::arg("relative") = std::array<int64_t, 4>{}, "Log-sum-exp, entropy and best key of every attention row.");
  m.def(
      "attention_rows",
      [](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, int64_t count, uintptr_t rows,
         uintptr_t probabilities, int threads, const std::vector<Atom>& atoms, float softcap,
         const std::array<int64_t, 4>& relative) {
        const Extras more(atoms, softcap, relative);
        const AttentionRows call{
            problem(sizes, q, k, scale, causal, causal_offset, key_mask, key_mask_stride, bias, more), count,
            address<const int64_t>(rows), address<float>(probabilities)};
        py::gil_scoped_release release;
        attention_rows(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"), py::arg("causal_offset"),
      py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("count"), py::arg("rows"),
      py::arg("probabilities"), py::arg("threads"), py::arg("atoms") = std::vector<Atom>{},
      py::arg("softcap") = 0.0f, py::arg("relative") = std::array<int64_t, 4>{}, "Chosen rows of the attention matrix.");
  m.def(
      "attention_merge",
      [](const std::array<int64_t, 4>& sizes, const std::vector<Part>& parts, const View& out, uintptr_t lse,
         int threads) {
        const Parts given(parts);
        const AttentionMerge call{sizes[0],          sizes[1],          sizes[2],    sizes[3],
                                  int64_t(parts.size()), given.outs.data(), given.lses.data(), output(out),
                                  address<float>(lse)};
        py::gil_scoped_release release;
        attention_merge(call, threads);
      },
      py::arg("sizes"), py::arg("parts"), py::arg("out"), py::arg("lse"), py::arg("threads"),
      "Merge of attention results over disjoint keys; sizes: batch, heads, length, width.");
  m.def(
      "attention_merge_backward",
      [](const std::array<int64_t, 4>& sizes, const std::vector<Part>& parts, const View& out, uintptr_t lse,
         const View& dout, uintptr_t dlse, const std::vector<Part>& gradients, int threads) {
        if (gradients.size() != parts.size()) throw py::value_error("attention merge: one gradient a part is wanted");
        const Parts given(parts);
        std::vector<MutableHeads> douts;
        std::vector<float*> dlses;
        for (const Part& gradient : gradients) {
          douts.push_back(output(gradient.first));
          dlses.push_back(address<float>(gradient.second));
        }
        const AttentionMergeBackward call{sizes[0],
                                          sizes[1],
                                          sizes[2],
                                          sizes[3],
                                          int64_t(parts.size()),
                                          given.outs.data(),
                                          given.lses.data(),
                                          input(out),
                                          address<const float>(lse),
                                          input(dout),
                                          address<const float>(dlse),
                                          douts.data(),
                                          dlses.data()};
        py::gil_scoped_release release;
        attention_merge_backward(call, threads);
      },
      py::arg("sizes"), py::arg("parts"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"),
      py::arg("gradients"), py::arg("threads"), "Gradients of the merge.");
}

}  // namespace vlm::bindings
