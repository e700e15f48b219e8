// One chunk of a block memory: what it sees, its representatives, and the lookup. Per-level code.
#pragma once

#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "selection/ranks.hpp"
#include "selection/selection_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

// `n` queries from position `start` on, the first of them number `first` of the call. Places in the store: the window of
// the chunk is [gone, gone + near); `far` keys behind it are listed. Keys and queries of the window are rotated to their
// places behind `base`.
struct Chunk {
  int64_t first, n, start, gone, base, blocks, initial, chosen, loose, far, near;
};

VLM_INLINE Chunk chunk_of(const BlockMemoryForward& c, int64_t first) {
  Chunk k;
  k.first = first;
  k.n = smaller(c.chunk, c.queries - first);
  k.start = c.keys - c.queries + first;
  k.gone = larger(0, k.start - c.window + 1);
  k.base = c.absolute ? 0 : k.gone;
  k.blocks = larger(0, k.gone - c.first_tokens) / c.block;
  const int64_t behind = larger(0, k.start + k.n - c.window);  // tokens that the last query has behind its window
  k.initial = smaller(c.first_tokens, behind);
  k.chosen = smaller(c.topk, k.blocks);
  k.loose = larger(0, behind - (c.first_tokens + k.blocks * c.block));
  k.far = k.initial + k.chosen * c.block + k.loose;
  k.near = k.start + k.n - k.gone;
  return k;
}

// Far keys are listed in their order, and what a query has still in its window are the last ones.
VLM_INLINE int64_t far_seen(const Chunk& k, int64_t query) { return larger(0, k.far - (k.n - 1 - query)); }
// Keys of the window that a query sees, from the first of the chunk's on: [near_from, near_to).
VLM_INLINE int64_t near_from(const BlockMemoryForward& c, const Chunk& k, int64_t query) {
  return larger(0, k.start + query - c.window + 1 - k.gone);
}
VLM_INLINE int64_t near_to(const Chunk& k, int64_t query) { return k.start + query + 1 - k.gone; }

VLM_INLINE int64_t scored_from(const BlockMemoryForward& c) { return c.keys - c.queries - c.scored; }
VLM_INLINE float* scores_of(const BlockMemoryForward& c, int64_t head, int64_t position) {
  return c.score + head * (c.scored + c.queries) + position - scored_from(c);
}
VLM_INLINE const float* row_of(const Heads& x, int64_t head, int64_t row) {
  return x.data + head * x.head_stride + row * x.row_stride;
}

// A row turned to a position.
VLM_INLINE void rotate(const BlockMemoryForward& c, const float* x, int64_t position, float* to) {
  const int64_t half = c.width / 2;
  const float* cosines = c.cosines.data + position * c.cosines.row_stride;
  const float* sines = c.sines.data + position * c.sines.row_stride;
  for (int64_t e = 0; e < half; e += W) {
    const int64_t n = half - e;
    const vf a = load_first(x + e, n), b = load_first(x + half + e, n);
    const vf cosine = load_first(cosines + e, n), sine = load_first(sines + e, n);
    store_first(to + e, a * cosine - b * sine, n);
    store_first(to + half + e, b * cosine + a * sine, n);
  }
}

VLM_INLINE void add_row(const float* x, int64_t width, float* to) {
  for (int64_t e = 0; e < width; e += W)
    store_first(to + e, load_first(to + e, width - e) + load_first(x + e, width - e), width - e);
}
VLM_INLINE void scale_row(float* x, int64_t width, float by) {
  for (int64_t e = 0; e < width; ++e) x[e] *= by;
}

// The representative of a block for one head. order, best: room for the tokens of a block in whole vectors.
static void form_block(const BlockMemoryForward& c, int64_t head, int64_t block, int32_t* order, int32_t* best) {
  const int64_t from = c.first_tokens + block * c.block, key_head = head / (c.heads / c.key_heads);
  float* mean = c.added + (head * c.more + block - c.formed) * c.width;
  best_places(scores_of(c, head, from), c.block, c.representatives, order, best);
  for (int64_t e = 0; e < c.width; ++e) mean[e] = 0.0f;
  for (int64_t r = 0; r < c.representatives; ++r) add_row(row_of(c.k, key_head, from + best[r]), c.width, mean);
  scale_row(mean, c.width, 1.0f / static_cast<float>(c.representatives));
}

// The mean of a chunk's queries, rotated to the fixed distance; zeros up to whole vectors. turned: room for a row.
static void mean_query(const BlockMemoryForward& c, const Chunk& k, int64_t head, float* turned, float* to) {
  for (int64_t e = 0; e < round_up(c.width, W); ++e) to[e] = turned[e] = 0.0f;
  for (int64_t i = 0; i < k.n; ++i) add_row(row_of(c.q, head, k.first + i), c.width, turned);
  scale_row(turned, c.width, 1.0f / static_cast<float>(k.n));
  rotate(c, turned, c.window - 1, to);
}

// scores[b] of the blocks [from, to): what the representatives of all heads have in common with the mean queries [H].
static void score_blocks(const BlockMemoryForward& c, const float* queries, int64_t from, int64_t to, float* scores) {
  constexpr int AT_ONCE = 8;
  for (int64_t block = from; block < to; block += AT_ONCE) {
    const int count = static_cast<int>(smaller(AT_ONCE, to - block));
    vf sum[AT_ONCE] = {};
    for (int64_t head = 0; head < c.heads; ++head) {
      const float* query = queries + head * round_up(c.width, W);
      for (int i = 0; i < count; ++i) {
        const int64_t b = block + i;
        const float* mean = b < c.formed ? row_of(c.means, head, b) : c.added + (head * c.more + b - c.formed) * c.width;
        for (int64_t e = 0; e < c.width; e += W) sum[i] += load_first(mean + e, c.width - e) * load(query + e);
      }
    }
    for (int i = 0; i < count; ++i) scores[block + i] = sum_lanes(sum[i]);
  }
}

// The places of the far keys, ascending.
static void list_far(const BlockMemoryForward& c, const Chunk& k, const int32_t* chosen, int32_t* places) {
  int64_t n = 0;
  for (int64_t j = 0; j < k.initial; ++j) places[n++] = static_cast<int32_t>(j);
  for (int64_t i = 0; i < k.chosen; ++i)
    for (int64_t j = 0; j < c.block; ++j)
      places[n++] = static_cast<int32_t>(c.first_tokens + chosen[i] * c.block + j);
  for (int64_t j = 0; j < k.loose; ++j) places[n++] = static_cast<int32_t>(c.first_tokens + k.blocks * c.block + j);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
