// What the contrastive units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void softmax_pair_forward(const PairForward& call, const PairTargets& targets, int threads);
void softmax_pair_backward(const PairBackward& call, const PairTargets& targets, int threads);
void sigmoid_pair_forward(const PairForward& call, const PairTargets& targets, int threads);
void sigmoid_pair_backward(const PairBackward& call, const PairTargets& targets, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
