// Weighted column sums of the attention matrix: a block for each tile of keys of a query head, in the order of queries.
#pragma once

#include "cuda/attention_backward.cuh"

namespace vlm::cuda {

template <int T>
constexpr std::size_t columns_shared_bytes =
    sizeof(float) *
    ((BackwardShape<T>::own + BackwardShape<T>::other) * row_room<T> + BackwardShape<T>::KeyBits::words);

template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    attention_columns_kernel(AttentionColumnSums call, const __grid_constant__ MaskProgram program) {
  using Shape = BackwardShape<T>;
  constexpr int R = Shape::R, C = Shape::C;
  VLM_DYN_SMEM(float, key);
  float* query = key + Shape::own * Shape::room;
  typename Shape::KeyBits bits{reinterpret_cast<uint32_t*>(query + Shape::other * Shape::room), false};

  const AttentionProblem& p = call.problem;
  const KeyBlock at = key_block(p, p.query_heads, Shape::own);
  const int64_t b = at.b, h = at.h, g = h / (p.query_heads / p.key_heads), j0 = at.j0, j1 = at.j1;
  const int64_t first_row = at.head * p.queries;
  const HeadMask mask{program, b, h};
  const float* bias = bias_of(p, b, h);
  load_tile<T>(key, Shape::own, head_of(p.k, b, g) + j0 * p.k.row_stride, p.k.row_stride, j1 - j0, p.width,
               [&](int row) { return mask.exists(j0 + row); });
  float sum[R];
  bool there[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t j = j0 + thread_row() * R + r;
    there[r] = j < p.keys && mask.exists(j);
    sum[r] = 0.0f;
  }
  for (int64_t i0 = 0; i0 < p.queries; i0 += Shape::other) {
    const int64_t i1 = smaller(i0 + Shape::other, p.queries);
    const Cover cover = mask.cover(i0, i1, j0, j1);
    if (cover == Cover::skip) continue;
    __syncthreads();
    load_tile<T>(query, Shape::other, head_of(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, i1 - i0, p.width,
                 always);
    bits.template fill<TILE_THREADS>(mask, cover, i0, j0);
    __syncthreads();
    float s[R][C];
    clear(s);
    tile_dot(key, query, Shape::room, round_to_4(p.width), s);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t i = i0 + thread_column() + 16 * c;
      if (i >= i1) continue;
      const float lse = call.lse[first_row + i], weight = call.weights == nullptr ? 1.0f : call.weights[first_row + i];
      if (weight == 0.0f) continue;  // not read into a sum
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const bool allowed = there[r] && bits.allows(thread_column() + 16 * c, thread_row() * R + r);
        sum[r] += weight * probability(p, allowed, bias, i, j0 + thread_row() * R + r, s[r][c], lse);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t j = j0 + thread_row() * R + r;
    const float total = row_sum(sum[r]);
    if (j < p.keys && thread_column() == 0) call.sums[at.head * p.keys + j] = total;
  }
}

template <int T>
void launch_attention_columns(const AttentionColumnSums& call, const MaskProgram& mask, void* stream) {
  const AttentionProblem& p = call.problem;
  if (const unsigned count = key_blocks(p, p.query_heads, BackwardShape<T>::own))
    VLM_LAUNCH(attention_columns_kernel<T>, {count}, {TILE_THREADS}, columns_shared_bytes<T>, stream, call, mask);
}

}  // namespace vlm::cuda
