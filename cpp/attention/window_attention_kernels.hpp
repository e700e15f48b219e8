// What the windowed attention unit of one level offers to its kernel table.
#pragma once

#include "vlm/window_attention.hpp"

namespace vlm {
namespace VLM_LEVEL {

void window_attention_forward(const WindowAttentionForward& call, int threads);
void window_attention_backward(const WindowAttentionBackward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
