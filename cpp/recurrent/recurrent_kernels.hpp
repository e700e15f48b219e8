// What the recurrent units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void linear_scan(const LinearScan& call, int threads);
void ssm_forward(const SsmForward& call, int threads);
void ssm_backward(const SsmBackward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
