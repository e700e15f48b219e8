// The table of kernels that every level fills; dispatch picks one.
#pragma once

#include "vlm/attention.hpp"
#include "vlm/contrastive.hpp"
#include "vlm/window_attention.hpp"

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
  void (*window_attention_forward)(const WindowAttentionForward&, int threads);
  void (*window_attention_backward)(const WindowAttentionBackward&, int threads);
};

const KernelTable& active_kernels();

namespace portable { extern const KernelTable kernel_table; }
namespace avx2 { extern const KernelTable kernel_table; }
namespace avx512 { extern const KernelTable kernel_table; }

}  // namespace vlm
