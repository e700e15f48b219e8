// Entries of exact attention on CUDA devices: checks, then the kernels for the widths at hand.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_columns.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_mma_backward.cuh"
#include "cuda/attention_relative.cuh"

namespace vlm::cuda {
namespace {

// The problem as the kernels take it: a table of relative positions is a bias whose rows go back by one each.
AttentionProblem checked(AttentionProblem p) {
  require_sizes("attention", {p.batch, p.query_heads, p.key_heads, p.queries, p.keys, p.width, p.value_width});
  require(p.key_heads > 0 && p.query_heads % p.key_heads == 0,
          "attention: query heads are not a multiple of key heads");
  require(width_steps(p) > 0, "attention: CUDA kernels take widths of at most 256");
  require(!p.half || width_steps(p) < 4, "attention: CUDA kernels take bf16 of widths of at most 128");
  require(p.softcap == 0.0f && p.temperature == nullptr && p.drop_below == 0,
          "attention: CUDA kernels take no softcap, temperature or dropout");
  if (p.relative == nullptr) return p;
  require(p.bias.data == nullptr && p.grid_columns == 0,
          "attention: CUDA kernels take a table of relative positions without a grid and without a bias");
  p.bias = {p.relative + (p.queries > 0 ? p.queries - 1 : 0), 0, p.relative_head_stride, -1};
  p.relative = nullptr;
  return p;
}

template <class Call>
Call checked_call(Call call) {
  call.problem = checked(call.problem);
  return call;
}

int64_t in_pieces_of_16(int64_t bytes) { return pieces(bytes, 16) * 16; }

int64_t delta_bytes(const AttentionProblem& p) {
  return in_pieces_of_16(static_cast<int64_t>(sizeof(float)) * p.batch * p.query_heads * p.queries);
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

void run_forward_bf16(const AttentionForward& call, const MaskProgram& mask, void* stream) {
  const AttentionProblem& p = call.problem;
  const AttentionForwardBf16 half{p, halves(p.q), halves(p.k), halves(p.v), halves(call.out), call.lse};
  for (const HalfHeads& t : {half.q, half.k, half.v}) check_rows(t);
  if (width_steps(p) == 1) return launch_attention_mma<64>(half, mask, stream);
  launch_attention_mma<128>(half, mask, stream);
}

void run_backward_bf16(const AttentionBackward& call, const MaskProgram& mask, float* delta, void* stream) {
  const AttentionProblem& p = call.problem;
  const AttentionBackwardBf16 half{p,
                                   halves(p.q),
                                   halves(p.k),
                                   halves(p.v),
                                   halves(call.out),
                                   call.lse,
                                   halves(call.dout),
                                   call.dlse,
                                   halves(call.dq),
                                   halves(call.dk),
                                   halves(call.dv)};
  for (const HalfHeads& t : {half.q, half.k, half.v, half.dout}) check_rows(t);
  if (width_steps(p) == 1) return launch_attention_mma_backward<64>(half, mask, delta, stream);
  launch_attention_mma_backward<128>(half, mask, delta, stream);
}

}  // namespace

int64_t device_shared_bytes(int device) { return block_room(device); }

int64_t attention_shared_bytes(const AttentionProblem& p) {
  const int steps = width_steps(checked(p));
  return steps == 1 ? most_shared_bytes<1, 4>() : steps == 2 ? most_shared_bytes<2, 4>() : most_shared_bytes<4, 2>();
}

int64_t attention_forward_workspace(const AttentionProblem& p) { return cover_count(mask_program(checked(p))); }

int64_t attention_backward_workspace(const AttentionProblem& p) {
  return delta_bytes(p) + attention_forward_workspace(p);
}

void attention_forward(const AttentionForward& given, void* workspace, void* stream) {
  const AttentionForward call = checked_call(given);
  const MaskProgram mask = prepared_mask(call.problem, workspace, stream);
  if (call.problem.half) return run_forward_bf16(call, mask, stream);
  switch (width_steps(call.problem)) {
    case 1: return launch_attention_forward<1, 4>(call, mask, stream);
    case 2: return launch_attention_forward<2, 4>(call, mask, stream);
    default: return launch_attention_forward<4, 2>(call, mask, stream);
  }
}

void attention_backward(const AttentionBackward& given, void* workspace, void* stream) {
  const AttentionBackward call = checked_call(given);
  const AttentionProblem& p = call.problem;
  require(given.problem.relative == nullptr || call.dbias == nullptr, "attention: a bias that is not there");
  require(given.problem.relative != nullptr || call.drelative == nullptr, "attention: a table that is not there");
  require(call.dtemperature == nullptr, "attention: CUDA kernels give no gradient of temperatures");
  require(!p.half || (call.dbias == nullptr && call.drelative == nullptr),
          "attention: CUDA kernels give the gradient of a bias in float32 alone");
  require(call.dbias == nullptr || ((call.bias_batch == 1 || call.bias_batch == p.batch) &&
                                    (call.bias_heads == 1 || call.bias_heads == p.query_heads) &&
                                    (call.bias_rows == 1 || call.bias_rows == p.queries)),
          "attention: extents of the bias gradient do not fit");
  float* delta = static_cast<float*>(workspace);
  const MaskProgram mask = prepared_mask(p, static_cast<char*>(workspace) + delta_bytes(p), stream);
  if (p.half) return run_backward_bf16(call, mask, delta, stream);
  const int64_t tables = p.relative_head_stride == 0 ? 1 : p.query_heads;
  const auto run = [&](auto backward, auto relative) {
    backward(call, mask, delta, stream);
    if (call.drelative != nullptr) relative(call, mask, delta, tables, stream);
  };
  switch (width_steps(p)) {
    case 1: return run(launch_attention_backward<1>, launch_attention_relative<1>);
    case 2: return run(launch_attention_backward<2>, launch_attention_relative<2>);
    default: return run(launch_attention_backward<4>, launch_attention_relative<4>);
  }
}

void attention_column_sums(const AttentionColumnSums& given, void* workspace, void* stream) {
  AttentionColumnSums call = given;
  call.problem.value_width = 0;
  require(!call.problem.half, "attention: column sums are computed in float32");
  call.problem = checked(call.problem);
  const MaskProgram mask = prepared_mask(call.problem, workspace, stream);
  switch (width_steps(call.problem)) {
    case 1: return launch_attention_columns<1>(call, mask, stream);
    case 2: return launch_attention_columns<2>(call, mask, stream);
    default: return launch_attention_columns<4>(call, mask, stream);
  }
}

}  // namespace vlm::cuda
