#include "vlm/attention_statistics.hpp"

#include "attention_calls.hpp"

namespace vlm::bindings {
namespace {

using Part = std::pair<View, uintptr_t>;  // output and lse

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
  define_attention_column_sums<int>(
      m, [](const AttentionColumnSums& call, int threads) { attention_column_sums(call, threads); },
      "Weighted column sums of the attention matrix; see vlm/attention_statistics.hpp.", py::arg("threads"));
  m.def(
      "attention_row_statistics",
      [](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, uintptr_t lse, uintptr_t entropy,
         uintptr_t best, const py::dict& extras, int threads) {
        const Extras more(extras);
        const AttentionRowStatistics call{
            attention_problem(sizes, q, k, {}, scale, causal, causal_offset, key_mask, key_mask_stride, bias, more),
            address<float>(lse), address<float>(entropy), address<int64_t>(best)};
        py::gil_scoped_release release;
        attention_row_statistics(call, threads);
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("lse"),
      py::arg("entropy"), py::arg("best"), py::arg("extras") = py::dict(), py::arg("threads"),
      "Log-sum-exp, entropy and best key of every attention row.");
  m.def(
      "attention_rows",
      [](const Sizes& sizes, const View& q, const View& k, float scale, bool causal, int64_t causal_offset,
         uintptr_t key_mask, int64_t key_mask_stride, const View& bias, int64_t count, uintptr_t rows,
         uintptr_t probabilities, const py::dict& extras, int threads) {
        const Extras more(extras);
        const AttentionRows call{
            attention_problem(sizes, q, k, {}, scale, causal, causal_offset, key_mask, key_mask_stride, bias, more),
            count, address<const int64_t>(rows), address<float>(probabilities)};
        py::gil_scoped_release release;
        attention_rows(call, threads);
      },
      py::kw_only(), py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("scale"), py::arg("causal"),
      py::arg("causal_offset"), py::arg("key_mask"), py::arg("key_mask_stride"), py::arg("bias"), py::arg("count"),
      py::arg("rows"), py::arg("probabilities"), py::arg("extras") = py::dict(), py::arg("threads"),
      "Chosen rows of the attention matrix.");
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
