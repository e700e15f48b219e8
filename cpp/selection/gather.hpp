// Products with rows that lie scattered in memory, read where they are: no copy, no packing. Per-level code.
//
// Tiles are transposed: a row of a tile belongs to a key, its lanes to the queries of the block. So a key is one
// broadcast number at a time, softmax and maxima over keys need no exchange of lanes, and a block of 32 queries is two
// vectors.
#pragma once

#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "core/vector_math.hpp"
#include "selection/selection_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int SCATTERED = W == 16 ? 8 : 4;  // rows of a tile: their addresses and the sums stay in registers

VLM_INLINE const float* selected_head(const Heads& x, int64_t b, int64_t h) {
  return x.data + b * x.batch_stride + h * x.head_stride;
}

// Places of the keys of the blocks [from, to) of a list. Returns their number.
VLM_INLINE int64_t keys_of(const SelectionProblem& p, const int32_t* list, int64_t from, int64_t to, int32_t* keys) {
  int64_t n = 0;
  for (int64_t i = from; i < to; ++i) {
    const int64_t start = list[i] * p.block_k, end = smaller(p.keys, start + p.block_k);
    for (int64_t j = start; j < end; ++j) keys[n++] = static_cast<int32_t>(j);
  }
  return n;
}

// Addresses of n >= 1 rows, followed by copies of the last one up to a multiple of SCATTERED and two tiles more, which
// the tile after the next is asked for.
VLM_INLINE void rows_at(const float* data, int64_t stride, const int32_t* places, int64_t n, const float** rows) {
  for (int64_t j = 0; j < n; ++j) rows[j] = data == nullptr ? nullptr : data + places[j] * stride;  // null: width 0
  for (int64_t j = n; j < round_up(n, SCATTERED) + 2 * SCATTERED; ++j) rows[j] = rows[n - 1];
}
VLM_INLINE int64_t rows_room(int64_t n) {  // in floats
  return (round_up(n, SCATTERED) + 2 * SCATTERED) * static_cast<int64_t>(sizeof(const float*) / sizeof(float));
}

// to[m][lane] = <rows[m], column `lane` of the panel>, V vectors of lanes.
template <int V>
static __attribute__((noinline)) void scattered_tile(int64_t width, const float* const* rows, const float* panel,
                                                     float* to, int64_t stride) {
  vf sum[SCATTERED][V];
  const float* at[SCATTERED];
#pragma GCC unroll 8
  for (int m = 0; m < SCATTERED; ++m) {
    at[m] = rows[m];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = vf{};
  }
  for (int64_t k = 0; k < width; ++k, panel += NR) {
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(panel + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < SCATTERED; ++m) {
      const vf value = splat(at[m][k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] += value * column[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < SCATTERED; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + m * stride + v * W, sum[m][v]);
}

// n rows of `rows_at` against `lanes` columns of one panel; `to` has room for a multiple of SCATTERED rows.
VLM_INLINE void multiply_scattered(int64_t n, int64_t lanes, int64_t width, const float* const* rows,
                                   const float* panel, float* to, int64_t stride) {
  for (int64_t j = 0; j < n; j += SCATTERED) {
    for (int m = 0; m < SCATTERED; ++m)
      for (int64_t k = 0; k < width; k += 16) fetch_soon(rows[j + 2 * SCATTERED + m], k);
    if (lanes > W)
      scattered_tile<NV>(width, rows + j, panel, to + j * stride, stride);
    else
      scattered_tile<1>(width, rows + j, panel, to + j * stride, stride);
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
