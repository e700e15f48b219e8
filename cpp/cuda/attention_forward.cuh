// Exact attention forward in float32: one block for each tile of 64 queries, streaming softmax over tiles of keys.
#pragma once

#include "cuda/attention_scores.cuh"

namespace vlm::cuda {

// T: steps of 64 columns. C: keys of a tile / 16.
template <int T, int C>
struct ForwardShape {
  static constexpr int R = 4, queries = 16 * R, keys = 16 * C, room = row_room<T>, weight_room = keys + 4;
  using Bits = PairBits<queries, keys>;
  static constexpr std::size_t shared_bytes =
      sizeof(float) * (queries * room + 2 * keys * room + queries * weight_room + Bits::words);
};

template <int T, int C>
__global__ void __launch_bounds__(TILE_THREADS, T == 1 ? 2 : 1)
    attention_forward_kernel(AttentionForward call, const __grid_constant__ MaskProgram program) {
  using Shape = ForwardShape<T, C>;
  constexpr int R = Shape::R;
  VLM_DYN_SMEM(float, query);
  float* key = query + Shape::queries * Shape::room;
  float* value = key + Shape::keys * Shape::room;
  float* weight = value + Shape::keys * Shape::room;
  typename Shape::Bits bits{reinterpret_cast<uint32_t*>(weight + Shape::queries * Shape::weight_room), false};

  const AttentionProblem& p = call.problem;
  const QueryBlock at = query_block(p, Shape::queries);
  const int64_t b = at.b, h = at.h, g = at.g, i0 = at.i0, i1 = at.i1;
  const HeadMask mask{program, b, h};
  const float* bias = bias_of(p, b, h);
  const float* keys = head_of(p.k, b, g);
  const float* values = head_of(p.v, b, g);

  load_tile<T>(query, Shape::queries, head_of(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, i1 - i0, p.width,
               always);
  Accumulator<R, T> out;
  out.clear();
  float top[R], sum[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    top[r] = minus_infinity();
    sum[r] = 0.0f;
  }

  for (int64_t j0 = 0; j0 < p.keys; j0 += Shape::keys) {
    const int64_t j1 = smaller(j0 + Shape::keys, p.keys);
    const Cover cover = mask.cover(i0, i1, j0, j1);
    if (cover == Cover::skip) continue;
    // Also the barrier after which the tiles of the last round may be overwritten.
    if (__syncthreads_count(my_key_exists(mask, j0, p.keys, Shape::keys)) == 0) continue;
    const auto exists = [&](int row) { return mask.exists(j0 + row); };
    load_tile<T>(key, Shape::keys, keys + j0 * p.k.row_stride, p.k.row_stride, j1 - j0, p.width, exists);
    load_tile<T>(value, Shape::keys, values + j0 * p.v.row_stride, p.v.row_stride, j1 - j0, p.value_width, exists);
    bits.template fill<TILE_THREADS>(mask, cover, i0, j0);
    __syncthreads();

    float s[R][C];
    clear(s);
    tile_dot(query, key, Shape::room, round_to_4(p.width), s);
    bool there[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t j = j0 + thread_column() + 16 * c;
      there[c] = j < p.keys && mask.exists(j);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r;
      float high = minus_infinity();
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const bool allowed = there[c] && bits.allows(thread_row() * R + r, thread_column() + 16 * c);
        s[r][c] = logit(p, allowed, bias, i, j0 + thread_column() + 16 * c, s[r][c]);
        high = fmaxf(high, s[r][c]);
      }
      const float now = fmaxf(top[r], row_max(high));
      const float reference = now == minus_infinity() ? 0.0f : now;  // nothing allowed yet: exp gives 0
      float part = 0.0f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        s[r][c] = expf(s[r][c] - reference);
        part += s[r][c];
      }
      const float shrink = expf(top[r] - reference);
      sum[r] = sum[r] * shrink + row_sum(part);
      top[r] = now;
      out.scale(r, shrink);
    }
    put_scores(weight, Shape::weight_room, s);
    __syncwarp();
    out.add_product(weight, Shape::weight_room, value, Shape::keys);
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    if (i >= p.queries) continue;
    const bool any = sum[r] > 0.0f;
    out.store_row(head_of(call.out, b, h) + i * call.out.row_stride, r, p.value_width, any ? 1.0f / sum[r] : 0.0f);
    if (thread_column() == 0)
      call.lse[(b * p.query_heads + h) * p.queries + i] = any ? top[r] + logf(sum[r]) : minus_infinity();
  }
}

template <int T, int C>
void launch_attention_forward(const AttentionForward& call, const MaskProgram& mask, void* stream) {
  using Shape = ForwardShape<T, C>;
  const AttentionProblem& p = call.problem;
  if (const unsigned count = query_blocks(p, Shape::queries))
    VLM_LAUNCH((attention_forward_kernel<T, C>), {count}, {TILE_THREADS}, Shape::shared_bytes, stream, call, mask);
}

}  // namespace vlm::cuda
