// The table of kernels that every level fills; dispatch picks one.
#pragma once

#include "vlm/attention.hpp"
#include "vlm/contrastive.hpp"
#include "vlm/recurrent.hpp"
#include "vlm/selection.hpp"

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
  void (*linear_scan)(const LinearScan&, int threads);
  void (*ssm_forward)(const SsmForward&, int threads);
  void (*ssm_backward)(const SsmBackward&, int threads);
  void (*select_hierarchical)(const HierarchicalSelection&, int threads);
  void (*block_sparse_forward)(const BlockSparseForward&, int threads);
};

const KernelTable& active_kernels();

namespace portable { extern const KernelTable kernel_table; }
namespace avx2 { extern const KernelTable kernel_table; }
namespace avx512 { extern const KernelTable kernel_table; }

}  // namespace vlm
