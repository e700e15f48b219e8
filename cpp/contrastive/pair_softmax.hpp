// What the two softmax units, plain and full targets, share. Per-level code.
#pragma once

#include "contrastive/pair_masks.hpp"

namespace vlm {
namespace VLM_LEVEL {

void softmax_full_forward(const PairForward& call, const PairTargets& targets, int threads);
void softmax_full_backward(const PairBackward& call, const PairTargets& targets, int threads);

// Constants of the gradient for one side, padded: what each number's upstream gradient says of a logit.
struct SoftmaxSide {
  float *lse, *weight, *positive, *total, *teacher, *teacher_lse;

  static int64_t room(int64_t n) { return 6 * n; }
  static SoftmaxSide make(float* data, int64_t n, int64_t padded, const float* statistics, const float* gradient) {
    SoftmaxSide side{data,              data + padded,     data + 2 * padded,
                     data + 3 * padded, data + 4 * padded, data + 5 * padded};
    for (int64_t i = 0; i < padded; ++i) {
      const bool used = i < n && gradient != nullptr;
      // A row without a denominator has the log-sum-exp -inf: it says nothing, and +inf makes its probabilities 0.
      const bool known = used && statistics[i] != -infinity;
      side.lse[i] = known ? statistics[i] : infinity;
      side.weight[i] = known ? gradient[i] : 0.0f;
      side.positive[i] = used ? gradient[n + i] : 0.0f;
      side.total[i] = used ? gradient[2 * n + i] : 0.0f;
      const bool taught = used && statistics[6 * n + i] != -infinity;
      side.teacher[i] = taught ? gradient[3 * n + i] : 0.0f;
      side.teacher_lse[i] = taught ? statistics[6 * n + i] : infinity;
    }
    return side;
  }
};

}  // namespace VLM_LEVEL
}  // namespace vlm
