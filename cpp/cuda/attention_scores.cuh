// What the attention kernels share: where a block's heads lie, its mask, logits of a tile.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/mask_covers.cuh"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

VLM_BOTH const float* head_of(const Heads& t, int64_t b, int64_t h) {
  return t.data + b * t.batch_stride + h * t.head_stride;
}
VLM_BOTH float* head_of(const MutableHeads& t, int64_t b, int64_t h) {
  return t.data + b * t.batch_stride + h * t.head_stride;
}

VLM_BOTH int round_to_4(int64_t n) { return int((n + 3) / 4 * 4); }

// The tile of queries that a block owns, and the heads that it reads. The last rows come first: where the mask is
// causal they are the longest.
struct QueryBlock {
  int64_t head, b, h, g, i0, i1;
};
VLM_DEVICE QueryBlock query_block(const AttentionProblem& p, int rows) {
  const int64_t tiles = pieces(p.queries, rows), head = blockIdx.x / tiles;
  const int64_t b = head / p.query_heads, h = head % p.query_heads, g = h / (p.query_heads / p.key_heads);
  const int64_t i0 = (tiles - 1 - blockIdx.x % tiles) * rows;
  return {head, b, h, g, i0, smaller(i0 + rows, p.queries)};
}
inline unsigned query_blocks(const AttentionProblem& p, int rows) {
  return blocks(pieces(p.queries, rows) * p.batch * p.query_heads);
}

// The tile of keys that a block owns, of one of `heads` heads.
struct KeyBlock {
  int64_t head, b, h, j0, j1;
};
VLM_DEVICE KeyBlock key_block(const AttentionProblem& p, int64_t heads, int rows) {
  const int64_t tiles = pieces(p.keys, rows), head = blockIdx.x / tiles, j0 = blockIdx.x % tiles * rows;
  return {head, head / heads, head % heads, j0, smaller(j0 + rows, p.keys)};
}
inline unsigned key_blocks(const AttentionProblem& p, int64_t heads, int rows) {
  return blocks(pieces(p.keys, rows) * p.batch * heads);
}

VLM_DEVICE const float* bias_of(const AttentionProblem& p, int64_t b, int64_t h) {
  return p.bias.data == nullptr ? nullptr : head_of(p.bias, b, h);
}

// Existence of this thread's key among the keys of a tile, for __syncthreads_count.
VLM_DEVICE bool my_key_exists(const HeadMask& mask, int64_t j0, int64_t keys, int tile) {
  const int64_t j = j0 + int(threadIdx.x);
  return int(threadIdx.x) < tile && j < keys && mask.exists(j);
}

// Logit of an allowed pair from its product, -inf for a removed one; the bias of a removed pair is not read.
VLM_DEVICE float logit(const AttentionProblem& p, bool allowed, const float* bias, int64_t i, int64_t j,
                       float product) {
  if (!allowed || i >= p.queries) return minus_infinity();
  return bias == nullptr ? product * p.scale : fmaf(product, p.scale, bias[i * p.bias.row_stride + j]);
}

// 1 for rows of at most 64 columns, 2 up to 128, 4 up to 256, else 0: no kernel.
inline int width_steps(const AttentionProblem& p) {
  const int64_t width = p.width > p.value_width ? p.width : p.value_width;
  return width <= 64 ? 1 : width <= 128 ? 2 : width <= 256 ? 4 : 0;
}

}  // namespace vlm::cuda
