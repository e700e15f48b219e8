// The table of kernels that every level fills; dispatch picks one.
#pragma once

#include "vlm/alignment.hpp"
#include "vlm/attention.hpp"
#include "vlm/attention_statistics.hpp"
#include "vlm/contrastive.hpp"
#include "vlm/tokens.hpp"
#include "vlm/vocabulary.hpp"
#include "vlm/late_interaction.hpp"
#include "vlm/recurrent.hpp"
#include "vlm/selection.hpp"
#include "vlm/block_memory.hpp"
#include "vlm/window_attention.hpp"
#include "vlm/float_products.hpp"

namespace vlm {

// Ids made dense and counted, prepared once outside the levels.
struct PairTargets {
  const int32_t* row_ids;          // [rows]
  const int32_t* column_ids;       // [columns]
  const int32_t* row_excluded;     // [rows], -1 where nothing is excluded
  const int32_t* column_excluded;  // [columns], -2 where nothing is
  const float* row_count;          // [rows]: number of positives
  const float* column_count;       // [columns]
  const float* positive_label;     // [rows]
  const float* negative_label;     // [rows]
  bool plain;                      // nothing but ids: no exclusions, labels, teacher, totals
};

// The kept tokens of all samples, one after the other, prepared once outside the levels.
struct TokenList {
  const float* data;
  int64_t samples, token_stride;
  int64_t count;            // kept tokens
  int64_t longest;          // most kept tokens of one sample
  const int64_t* first;     // [samples + 1]: tokens of sample i are [first[i], first[i + 1])
  const int64_t* source;    // [count]: where a token lies in `data`
  const int64_t* position;  // [count]: its row in a contiguous [samples * tokens, width]
};

struct KernelTable {
  void (*attention_forward)(const AttentionForward&, int threads);
  void (*attention_backward)(const AttentionBackward&, int threads);
  void (*softmax_pair_forward)(const PairForward&, const PairTargets&, int threads);
  void (*softmax_pair_backward)(const PairBackward&, const PairTargets&, int threads);
  void (*sigmoid_pair_forward)(const PairForward&, const PairTargets&, int threads);
  void (*sigmoid_pair_backward)(const PairBackward&, const PairTargets&, int threads);
  void (*attention_column_sums)(const AttentionColumnSums&, int threads);
  void (*attention_row_statistics)(const AttentionRowStatistics&, int threads);
  void (*attention_rows)(const AttentionRows&, int threads);
  void (*attention_merge)(const AttentionMerge&, int threads);
  void (*attention_merge_backward)(const AttentionMergeBackward&, int threads);
  void (*token_partners)(const TokenMatch&, float* best, int32_t* partner, int threads);
  void (*token_gather)(const TokenGather&, int threads);
  void (*token_scatter)(const TokenScatter&, const int64_t* starts, const int64_t* members, int threads);
  void (*cross_entropy_rows)(const CrossEntropyRows&, int threads);
  void (*divergence_rows)(const DivergenceRows&, int threads);
  void (*alignment_forward)(const AlignmentForward&, int threads);
  void (*alignment_backward)(const AlignmentBackward&, int threads);
  void (*late_forward)(const LateForward&, const TokenList& rows, const TokenList& columns, int threads);
  void (*late_backward)(const LateBackward&, const TokenList& rows, const TokenList& columns, int threads);
  void (*linear_scan)(const LinearScan&, int threads);
  void (*ssm_forward)(const SsmForward&, int threads);
  void (*ssm_backward)(const SsmBackward&, int threads);
  void (*select_hierarchical)(const HierarchicalSelection&, int threads);
  void (*block_sparse_forward)(const BlockSparseForward&, int threads);
  void (*block_memory_forward)(const BlockMemoryForward&, int threads);
  void (*window_attention_forward)(const WindowAttentionForward&, int threads);
  void (*window_attention_backward)(const WindowAttentionBackward&, int threads);
  void (*float_product_rows)(const FloatProduct&, int threads);
  void (*float_product_gradients)(const FloatProductGradients&, int threads);
};

const KernelTable& active_kernels();

namespace portable { extern const KernelTable kernel_table; }
namespace avx2 { extern const KernelTable kernel_table; }
namespace avx512 { extern const KernelTable kernel_table; }

}  // namespace vlm
