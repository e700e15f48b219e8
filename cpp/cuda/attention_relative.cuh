// Gradient of a table of relative positions: a block for 64 places of the table, which are diagonals of the scores.
#pragma once

#include "cuda/attention_backward.cuh"

namespace vlm::cuda {

constexpr int RELATIVE_STRIP = 64;

// The table has queries + keys - 1 places for each of `heads` (1: shared by all); pair (i, j) is at place queries - 1 -
// i + j.
template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    attention_relative_kernel(AttentionBackward call, const __grid_constant__ MaskProgram program, const float* delta,
                              int64_t heads) {
  using Shape = BackwardShape<T>;
  constexpr int R = Shape::R, C = Shape::C;
  VLM_DYN_SMEM(float, room);
  ScoreTiles<T> tiles(room);

  const AttentionProblem& p = call.problem;
  const int64_t places = p.queries + p.keys - 1, strips = pieces(places, RELATIVE_STRIP);
  const int64_t t0 = blockIdx.x % strips * RELATIVE_STRIP, own_h = blockIdx.x / strips, t = t0 + threadIdx.x;
  const int64_t h0 = heads == 1 ? 0 : own_h, h1 = heads == 1 ? p.query_heads : own_h + 1;
  float sum = 0.0f;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = h0; h < h1; ++h) {
      const HeadMask mask{program, b, h};
      for (int64_t i0 = 0; i0 < p.queries; i0 += Shape::own) {
        const int64_t i1 = smaller(i0 + Shape::own, p.queries), shift = t0 - (p.queries - 1);
        const int64_t first = shift + i0 > 0 ? shift + i0 : 0;  // of the keys on these diagonals
        const int64_t end = smaller(shift + RELATIVE_STRIP + i1 - 1, p.keys);
        for (int64_t j0 = first / Shape::other * Shape::other; j0 < end; j0 += Shape::other) {
          const int64_t j1 = smaller(j0 + Shape::other, p.keys);
          const Cover cover = mask.cover(i0, i1, j0, j1);
          if (cover == Cover::skip) continue;
          tiles.put_keys(p, mask, cover, i0, j0, j1);
          tiles.put_queries(call, b, h, i0, i1);
          __syncthreads();
          float gradient[R][C];
          tiles.logit_gradient(call, delta, mask, i0, j0, gradient);
          put_scores(tiles.weight, Shape::weight_room, gradient);
          __syncthreads();  // after it the tiles may be overwritten too
          if (threadIdx.x >= RELATIVE_STRIP) continue;
          for (int64_t i = i0; i < i1; ++i) {
            const int64_t j = t - (p.queries - 1) + i;
            if (j >= j0 && j < j1) sum += tiles.weight[(i - i0) * Shape::weight_room + (j - j0)];
          }
        }
      }
    }
  if (threadIdx.x < RELATIVE_STRIP && t < places) call.drelative[own_h * places + t] = sum;
}

template <int T>
void launch_attention_relative(const AttentionBackward& call, const MaskProgram& mask, const float* delta,
                               int64_t heads, void* stream) {
  const AttentionProblem& p = call.problem;
  const int64_t places = p.queries + p.keys - 1;
  if (places <= 0) return;
  VLM_LAUNCH(attention_relative_kernel<T>, {blocks(pieces(places, RELATIVE_STRIP) * heads)}, {TILE_THREADS},
             BackwardShape<T>::shared_bytes, stream, call, mask, delta, heads);
}

}  // namespace vlm::cuda
