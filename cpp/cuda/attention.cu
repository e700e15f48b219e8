// Entries of exact attention on CUDA devices: checks, then the kernels for the widths at hand.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {
namespace {

void check_problem(const AttentionProblem& p) {
  require_sizes("attention", {p.batch, p.query_heads, p.key_heads, p.queries, p.keys, p.width, p.value_width});
  require(p.key_heads > 0 && p.query_heads % p.key_heads == 0,
          "attention: query heads are not a multiple of key heads");
  require(width_steps(p) > 0, "attention: CUDA kernels take widths of at most 256");
}

}  // namespace

void attention_forward(const AttentionForward& call, void* stream) {
  check_problem(call.problem);
  switch (width_steps(call.problem)) {
    case 1: return launch_attention_forward<1, 4>(call, stream);
    case 2: return launch_attention_forward<2, 4>(call, stream);
    default: return launch_attention_forward<4, 2>(call, stream);
  }
}

int64_t attention_backward_workspace(const AttentionProblem& p) {
  check_problem(p);
  return static_cast<int64_t>(sizeof(float)) * p.batch * p.query_heads * p.queries;
}

void attention_backward(const AttentionBackward& call, void* workspace, void* stream) {
  const AttentionProblem& p = call.problem;
  check_problem(p);
  require(call.dbias == nullptr || ((call.bias_batch == 1 || call.bias_batch == p.batch) &&
                                    (call.bias_heads == 1 || call.bias_heads == p.query_heads) &&
                                    (call.bias_rows == 1 || call.bias_rows == p.queries)),
          "attention: extents of the bias gradient do not fit");
  float* delta = static_cast<float*>(workspace);
  switch (width_steps(p)) {
    case 1: return launch_attention_backward<1>(call, delta, stream);
    case 2: return launch_attention_backward<2>(call, delta, stream);
    default: return launch_attention_backward<4>(call, delta, stream);
  }
}

}  // namespace vlm::cuda
