// What the attention units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void attention_forward(const AttentionForward& call, int threads);
void attention_backward(const AttentionBackward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
