// The table of kernels that every level fills; dispatch picks one.
#pragma once

#include "vlm/alignment.hpp"
#include "vlm/attention.hpp"
#include "vlm/attention_statistics.hpp"
#include "vlm/contrastive.hpp"
#include "vlm/tokens.hpp"
#include "vlm/vocabulary.hpp"

namespace vlm {

// Ids made dense and counted, prepared once outside the levels.
struct PairTargets {
  const int32_t* row_ids;             // [rows]
  const int32_t* column_ids;          // [columns]
  const float* row_share;             // [rows]: 1 / number of positives, 0 if none
  const float* column_share;          // [columns]
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
};

const KernelTable& active_kernels();

namespace portable { extern const KernelTable kernel_table; }
namespace avx2 { extern const KernelTable kernel_table; }
namespace avx512 { extern const KernelTable kernel_table; }

}  // namespace vlm
