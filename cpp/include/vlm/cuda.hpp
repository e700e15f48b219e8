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
#include "vlm/contrastive.hpp"

namespace vlm::cuda {

// Attention. The float32 kernels compute as the CPU's do, in another order of sums.
void attention_forward(const AttentionForward& call, void* stream);

int64_t attention_backward_workspace(const AttentionProblem& problem);
void attention_backward(const AttentionBackward& call, void* workspace, void* stream);

// bf16 in and out on tensor cores: products of bf16, sums in float32, probabilities rounded to bf16 for the second
// product. Data is 16-byte aligned and strides are multiples of 8, so that rows can be copied in pieces of 16 bytes.
struct HalfHeads {
  const uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct MutableHalfHeads {
  uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionForwardBf16 {
  AttentionProblem problem;  // its q, k, v are not looked at; mask and bias (float32) are
  HalfHeads q, k, v;
  MutableHalfHeads out;
  float* lse;
};

void attention_forward_bf16(const AttentionForwardBf16& call, void* stream);

// The most shared memory that a block of the kernels for this problem asks for; a device may have less.
int64_t attention_shared_bytes(const AttentionProblem& problem);

// Contrastive losses, in float32. dlog_scale and dbias point to doubles on the device. The workspace holds 12 bytes for
// each column and 64 rows.
int64_t pair_workspace(const PairProblem& problem);
void pair_forward(PairLoss loss, const PairForward& call, void* workspace, void* stream);
void pair_backward(PairLoss loss, const PairBackward& call, void* workspace, void* stream);

}  // namespace vlm::cuda
