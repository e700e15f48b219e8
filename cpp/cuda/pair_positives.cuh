// Which pairs of a contrastive loss are positive, and the share of each.
#pragma once

#include "cuda/pair_tile.cuh"

namespace vlm::cuda {

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
