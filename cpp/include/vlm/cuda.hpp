// The operators of the core on CUDA devices: same problems as on the CPU, but every pointer is device memory.
//
// `stream` is a cudaStream_t. Calls return once the kernels are launched; nothing is allocated: a caller gives
// `workspace` of at least the bytes asked for, 256-byte aligned, that may be reused once the stream has passed. Results do
// not depend on the order in which blocks run. All throw std::invalid_argument on what the kernels do not take and
// std::runtime_error with CUDA's words if a launch fails.
//
// Limits beyond the CPU's: widths of at most 256 in attention (128 in bf16), fewer than 2^31 blocks.
#pragma once

#include <cstdint>

#include "vlm/attention.hpp"

namespace vlm::cuda {

void attention_forward(const AttentionForward& call, void* stream);

int64_t attention_backward_workspace(const AttentionProblem& problem);
void attention_backward(const AttentionBackward& call, void* workspace, void* stream);

}  // namespace vlm::cuda
