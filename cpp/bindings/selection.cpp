#include "vlm/selection.hpp"

#include <array>
#include <pybind11/stl.h>

#include "bindings.hpp"

namespace py = pybind11;

namespace vlm::bindings {
namespace {

using View = std::array<int64_t, 4>;   // address, then batch, head and row stride
using Sizes = std::array<int64_t, 9>;  // batch, query heads, key heads, queries, keys, width, offset, block_q, block_k

Heads input(const View& v) { return {address<const float>(static_cast<uintptr_t>(v[0])), v[1], v[2], v[3]}; }
MutableHeads output(const View& v) { return {address<float>(static_cast<uintptr_t>(v[0])), v[1], v[2], v[3]}; }
SelectionProblem problem(const Sizes& n, const View& q, const View& k) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], input(q), input(k), n[6], n[7], n[8]};
}

}  // namespace

void register_selection(py::module_& m) {
  m.def(
      "select_hierarchical",
      [](const Sizes& sizes, const View& q, const View& k, int64_t budget, int64_t window, int64_t sinks,
         int64_t row_step, int64_t capacity, int representative, uintptr_t indices, uintptr_t counts,
         uintptr_t evaluations, int threads) {
        const HierarchicalSelection call{problem(sizes, q, k),
                                         budget,
                                         window,
                                         sinks,
                                         row_step,
                                         capacity,
                                         static_cast<Representative>(representative),
                                         address<int32_t>(indices),
                                         address<int32_t>(counts),
                                         address<int64_t>(evaluations)};
        py::gil_scoped_release release;
        select_hierarchical(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("budget"), py::arg("window"), py::arg("sinks"),
      py::arg("row_step"), py::arg("capacity"), py::arg("representative"), py::arg("indices"), py::arg("counts"),
      py::arg("evaluations"), py::arg("threads"), "Hierarchical search for key blocks; see vlm/selection.hpp.");
  m.def(
      "block_sparse_forward",
      [](const Sizes& sizes, const View& q, const View& k, const View& v, int64_t value_width, int64_t capacity,
         float scale, uintptr_t indices, uintptr_t counts, const View& out, uintptr_t lse, int threads) {
        const BlockSparseForward call{problem(sizes, q, k),
                                      input(v),
                                      value_width,
                                      capacity,
                                      scale,
                                      address<const int32_t>(indices),
                                      address<const int32_t>(counts),
                                      output(out),
                                      address<float>(lse)};
        py::gil_scoped_release release;
        block_sparse_forward(call, threads);
      },
      py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("value_width"), py::arg("capacity"),
      py::arg("scale"), py::arg("indices"), py::arg("counts"), py::arg("out"), py::arg("lse"), py::arg("threads"),
      "Attention over listed key blocks.");
}

}  // namespace vlm::bindings
