// Entries of exact attention on CUDA devices: checks, then the kernels for the widths at hand.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_columns.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_mma.cuh"

namespace vlm::cuda {
namespace {

void check_problem(const AttentionProblem& p) {
  require_sizes("attention", {p.batch, p.query_heads, p.key_heads, p.queries, p.keys, p.width, p.value_width});
  require(p.key_heads > 0 && p.query_heads % p.key_heads == 0,
          "attention: query heads are not a multiple of key heads");
  require(width_steps(p) > 0, "attention: CUDA kernels take widths of at most 256");
}

template <int T, int C>
int64_t most_shared_bytes() {
  return ForwardShape<T, C>::shared_bytes > BackwardShape<T>::shared_bytes ? ForwardShape<T, C>::shared_bytes
                                                                          : BackwardShape<T>::shared_bytes;
}

void check_rows(const HalfHeads& t) {
  require(reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch_stride % 8 == 0 && t.head_stride % 8 == 0 &&
              t.row_stride % 8 == 0,
          "attention: the bf16 kernel takes rows at multiples of 16 bytes");
}

}  // namespace

int64_t device_shared_bytes(int device) { return block_room(device); }

int64_t attention_shared_bytes(const AttentionProblem& p) {
  check_problem(p);
  const int steps = width_steps(p);
  return steps == 1 ? most_shared_bytes<1, 4>() : steps == 2 ? most_shared_bytes<2, 4>() : most_shared_bytes<4, 2>();
}

void attention_forward_bf16(const AttentionForwardBf16& call, void* stream) {
  check_problem(call.problem);
  require(width_steps(call.problem) < 4, "attention: the bf16 kernel takes widths of at most 128");
  for (const HalfHeads& t : {call.q, call.k, call.v}) check_rows(t);
  if (width_steps(call.problem) == 1) return launch_attention_mma<64>(call, stream);
  launch_attention_mma<128>(call, stream);
}

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

void attention_column_sums(const AttentionColumnSums& call, void* stream) {
  AttentionColumnSums plain = call;
  plain.problem.value_width = 0;
  check_problem(plain.problem);
  switch (width_steps(plain.problem)) {
    case 1: return launch_attention_columns<1>(plain, stream);
    case 2: return launch_attention_columns<2>(plain, stream);
    default: return launch_attention_columns<4>(plain, stream);
  }
}

}  // namespace vlm::cuda
