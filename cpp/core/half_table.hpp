// The kernels for tensors stored as bfloat16, which only the level that multiplies bfloat16 has.
#pragma once

#include "core/kernel_table.hpp"
#include "vlm/half_products.hpp"

namespace vlm {

struct HalfKernels {
  void (*attention_forward)(const AttentionForward&, int threads);
  void (*attention_backward)(const AttentionBackward&, int threads);
  void (*softmax_pair_forward)(const PairForward&, const PairTargets&, int threads);
  void (*softmax_pair_backward)(const PairBackward&, const PairTargets&, int threads);
  void (*sigmoid_pair_forward)(const PairForward&, const PairTargets&, int threads);
  void (*sigmoid_pair_backward)(const PairBackward&, const PairTargets&, int threads);
  void (*product_rows)(const HalfProduct&, int threads);
  void (*product_gradients)(const HalfProductGradients&, int threads);
};

const HalfKernels* active_half_kernels();  // null where the level in force has none

namespace avx512_bf16 { extern const HalfKernels half_kernels; }

}  // namespace vlm
