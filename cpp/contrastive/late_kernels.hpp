// What the late-interaction units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void late_forward(const LateForward& call, const TokenList& rows, const TokenList& columns, int threads);
void late_backward(const LateBackward& call, const TokenList& rows, const TokenList& columns, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
