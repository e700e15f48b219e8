// Shared by the forward and backward selective scan: a block of channels as lanes, and what a chunk needs of it.
//
// A task is (batch, group of BLOCKS blocks of W channels). It walks its chunks in time; inside a chunk the blocks are
// walked one after another, so that rows are read while their memory is near. Per-level code.
#pragma once

#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "core/vector_math.hpp"
#include "recurrent/recurrent_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int64_t GROUP = 64;  // channels of a task
constexpr int64_t BLOCKS = GROUP / W;

VLM_INLINE vf softplus(vf x) {
  const vf size = select(x < 0.0f, x, -x);  // -|x|
  return maximum(x, vf{}) + log1p_unit(exp(size));
}
VLM_INLINE vf sigmoid(vf x) {
  const vf size = exp(select(x < 0.0f, x, -x)), inverse = 1.0f / (1.0f + size);
  return select(x < 0.0f, size * inverse, inverse);
}

VLM_INLINE bool ssm_exists(const SsmProblem& p, int64_t b, int64_t t) {
  return p.keep == nullptr || p.keep[b * p.length + t] != 0;
}
// Whether the state is forgotten before position t.
VLM_INLINE bool ssm_begins(const SsmProblem& p, int64_t b, int64_t t) {
  return p.run != nullptr && t > 0 && p.run[b * p.length + t] != p.run[b * p.length + t - 1];
}
VLM_INLINE const float* ssm_row(const Rows& rows, int64_t b, int64_t t) {
  return rows.data + b * rows.batch_stride + t * rows.row_stride;
}

// [channels from c0, S] contiguous <-> [S][W], channels as lanes; missing channels are 0.
VLM_INLINE void ssm_to_lanes(const float* from, int64_t c0, int64_t channels, int64_t states, float* to) {
  for (int64_t l = 0; l < W; ++l)
    for (int64_t s = 0; s < states; ++s)
      to[s * W + l] = from != nullptr && c0 + l < channels ? from[(c0 + l) * states + s] : 0.0f;
}
VLM_INLINE void ssm_from_lanes(const float* from, int64_t c0, int64_t channels, int64_t states, float* to) {
  for (int64_t l = 0; l < W && c0 + l < channels; ++l)
    for (int64_t s = 0; s < states; ++s) to[(c0 + l) * states + s] = from[s * W + l];
}

VLM_INLINE int ssm_threads(const SsmProblem& p, int threads) {
  return static_cast<double>(p.batch) * p.length * p.channels * p.states < 2e5 ? 1 : threads;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
