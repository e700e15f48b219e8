// What the kernels of the contrastive losses share: products of 64 x 64 pairs with the width streamed in slices of 64.
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

// Which pairs are positive, seen from one side: its own index first.
struct Positives {
  const int64_t* own_ids;  // null: the partner of i is i + offset
  const int64_t* other_ids;
  int64_t offset;

  VLM_BOTH bool operator()(int64_t own, int64_t other) const {
    return own_ids == nullptr ? other == own + offset : own_ids[own] == other_ids[other];
  }
};

VLM_BOTH Positives positives_of_rows(const PairProblem& p) { return {p.row_ids, p.column_ids, p.row_offset}; }
VLM_BOTH Positives positives_of_columns(const PairProblem& p) { return {p.column_ids, p.row_ids, -p.row_offset}; }

// share[i] = 1 / number of positives of i, 0 without any.
__global__ void __launch_bounds__(TILE_THREADS) pair_share_kernel(Positives positive, int64_t own, int64_t others,
                                                                  float* share) {
  const int64_t i = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x;
  if (i >= own) return;
  int64_t count = 0;
  if (positive.own_ids == nullptr) {
    const int64_t j = i + positive.offset;
    count = j >= 0 && j < others;
  } else {
    for (int64_t j = 0; j < others; ++j) count += positive(i, j);
  }
  share[i] = count > 0 ? 1.0f / float(count) : 0.0f;
}

// Shares of all rows, then of all columns, into 2 arrays of the workspace.
inline void launch_pair_shares(const PairProblem& p, float* row_share, float* column_share, void* stream) {
  if (p.rows > 0)
    VLM_LAUNCH(pair_share_kernel, {blocks(pieces(p.rows, TILE_THREADS))}, {TILE_THREADS}, 0, stream,
               positives_of_rows(p), p.rows, p.columns, row_share);
  if (p.columns > 0)
    VLM_LAUNCH(pair_share_kernel, {blocks(pieces(p.columns, TILE_THREADS))}, {TILE_THREADS}, 0, stream,
               positives_of_columns(p), p.columns, p.rows, column_share);
}

}  // namespace vlm::cuda
