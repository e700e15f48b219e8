// The calls of token reduction, of the CPU core and of CUDA devices alike; `Place` and `names` as in
// attention_calls.hpp.
#pragma once

#include "views.hpp"
#include "vlm/tokens.hpp"

namespace vlm::bindings {

namespace py = pybind11;

template <class... Place, class Run, class... Names>
void define_token_match(py::module_& m, Run run, Names... names) {
  m.def(
      "token_match",
      [run](const std::array<int64_t, 4>& sizes, uintptr_t metric, const std::array<int64_t, 3>& strides,
            int64_t merged, int64_t protect, int order, uintptr_t source, uintptr_t target, uintptr_t kept,
            uintptr_t assign, Place... place) {
        if (order < 0 || order > 2) throw py::value_error("token match: order is 0, 1 or 2");
        const TokenMatch call{sizes[0],
                              sizes[1],
                              sizes[2],
                              sizes[3],
                              address<const float>(metric),
                              strides[0],
                              strides[1],
                              strides[2],
                              merged,
                              protect,
                              static_cast<MatchOrder>(order),
                              address<int64_t>(source),
                              address<int64_t>(target),
                              address<int64_t>(kept),
                              address<int64_t>(assign)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::arg("sizes"), py::arg("metric"), py::arg("strides"), py::arg("merged"), py::arg("protect"), py::arg("order"),
      py::arg("source"), py::arg("target"), py::arg("kept"), py::arg("assign"), names...,
      "Bipartite matching of similar tokens; sizes: batch, heads, length, width; see vlm/tokens.hpp.");
}

template <class... Place, class Run, class... Names>
void define_token_select(py::module_& m, Run run, Names... names) {
  m.def(
      "token_select",
      [run](int64_t batch, int64_t length, uintptr_t scores, uintptr_t counts, uintptr_t valid, uintptr_t always,
            uintptr_t index, uintptr_t found, Place... place) {
        const TokenSelect call{batch,
                               length,
                               address<const float>(scores),
                               address<const int64_t>(counts),
                               address<const uint8_t>(valid),
                               address<const uint8_t>(always),
                               address<int64_t>(index),
                               address<int64_t>(found)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::arg("batch"), py::arg("length"), py::arg("scores"), py::arg("counts"), py::arg("valid"), py::arg("always"),
      py::arg("index"), py::arg("found"), names..., "Ascending indices of the best scores.");
}

template <class... Place, class Run, class... Names>
void define_token_gather(py::module_& m, Run run, Names... names) {
  m.def(
      "token_gather",
      [run](const std::array<int64_t, 4>& sizes, uintptr_t from, int64_t batch_stride, int64_t row_stride,
            int64_t element_bytes, uintptr_t index, uintptr_t weights, uintptr_t to, Place... place) {
        const TokenGather call{sizes[0],      sizes[1],
                               sizes[2],      sizes[3],
                               address<const void>(from), batch_stride,
                               row_stride,    element_bytes,
                               address<const int64_t>(index), address<const float>(weights),
                               address<void>(to)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::arg("sizes"), py::arg("from_"), py::arg("batch_stride"), py::arg("row_stride"), py::arg("element_bytes"),
      py::arg("index"), py::arg("weights"), py::arg("to"), names...,
      "Rows by index; sizes: batch, length of the source, of the result, width.");
}

template <class... Place, class Run, class... Names>
void define_token_scatter(py::module_& m, Run run, Names... names) {
  m.def(
      "token_scatter",
      [run](const std::array<int64_t, 4>& sizes, uintptr_t from, int64_t batch_stride, int64_t row_stride,
            uintptr_t index, uintptr_t weights, uintptr_t to, Place... place) {
        const TokenScatter call{sizes[0],
                                sizes[1],
                                sizes[2],
                                sizes[3],
                                address<const float>(from),
                                batch_stride,
                                row_stride,
                                address<const int64_t>(index),
                                address<const float>(weights),
                                address<float>(to)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::arg("sizes"), py::arg("from_"), py::arg("batch_stride"), py::arg("row_stride"), py::arg("index"),
      py::arg("weights"), py::arg("to"), names...,
      "Sums of rows by slot; sizes: batch, length of the source, slots, width.");
}

template <class... Place, class Run, class... Names>
void define_token_weights(py::module_& m, Run run, Names... names) {
  m.def(
      "token_weights",
      [run](const std::array<int64_t, 3>& sizes, uintptr_t assign, uintptr_t token_sizes, bool by_size,
            uintptr_t weights, uintptr_t slot_sizes, Place... place) {
        const TokenWeights call{sizes[0],
                                sizes[1],
                                sizes[2],
                                address<const int64_t>(assign),
                                address<const float>(token_sizes),
                                by_size,
                                address<float>(weights),
                                address<float>(slot_sizes)};
        py::gil_scoped_release release;
        run(call, place...);
      },
      py::arg("sizes"), py::arg("assign"), py::arg("token_sizes"), py::arg("by_size"), py::arg("weights"),
      py::arg("slot_sizes"), names..., "Weights of a merge; sizes: batch, length, slots.");
}

}  // namespace vlm::bindings
