// Products of 64 x 64 pairs of rows with the width streamed in slices of 64: contrastive losses, vocabulary, matching.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

constexpr int PAIR_TILE = 64, PAIR_ROWS = 4, PAIR_COLUMNS = 4, PAIR_ROOM = row_room<1>;
constexpr int PAIR_SLICE_FLOATS = PAIR_TILE * PAIR_ROOM;

// s[r][c] = <x_i, y_j> for i = i0 + ty 4 + r, j = j0 + tx + 16 c; 0 beyond the last row or column.
VLM_DEVICE void pair_products(const Matrix& x, int64_t rows, const Matrix& y, int64_t columns, int64_t width,
                              int64_t i0, int64_t j0, float* x_slice, float* y_slice,
                              float (&s)[PAIR_ROWS][PAIR_COLUMNS]) {
  clear(s);
  int64_t e = 0;
  do {  // at least once, for its barriers
    __syncthreads();
    load_tile<1>(x_slice, PAIR_TILE, x.data + i0 * x.row_stride + e, x.row_stride, rows - i0, width - e, always);
    load_tile<1>(y_slice, PAIR_TILE, y.data + j0 * y.row_stride + e, y.row_stride, columns - j0, width - e, always);
    __syncthreads();
    tile_dot(x_slice, y_slice, PAIR_ROOM, int(smaller((width - e + 3) / 4 * 4, int64_t(64))), s);
    e += 64;
  } while (e < width);
}

// Takes logits, whose largest of this thread is `high`, into the streaming maximum and sum of exponentials of their row.
template <int C>
VLM_DEVICE void add_to_row(const float (&s)[C], float high, float& top, float& sum) {
  const float now = fmaxf(top, row_max(high)), reference = now == minus_infinity() ? 0.0f : now;
  float part = 0.0f;
#pragma unroll
  for (int c = 0; c < C; ++c) part += expf(s[c] - reference);
  sum = sum * expf(top - reference) + row_sum(part);
  top = now;
}

}  // namespace vlm::cuda
