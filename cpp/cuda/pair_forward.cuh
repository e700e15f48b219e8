// Contrastive losses forward: a block for each 64 rows walks over all columns. Statistics of rows stay in registers;
// those of columns leave as one partial for each block and are merged in the order of blocks.
#pragma once

#include "cuda/pair_positives.cuh"

namespace vlm::cuda {

constexpr int PAIR_WARPS = TILE_THREADS / 32;

// Maximum, sum of exp(z - maximum) and sum over positives, of one column and 64 rows.
struct ColumnPart {
  float maximum, sum, positives;
};

__global__ void __launch_bounds__(TILE_THREADS) softmax_forward_kernel(PairForward call, const float* row_share,
                                                                       ColumnPart* parts) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, x_slice);
  float* y_slice = x_slice + PAIR_SLICE_FLOATS;
  ColumnPart* warp_parts = reinterpret_cast<ColumnPart*>(y_slice + PAIR_SLICE_FLOATS);  // [warps, 64]
  const PairProblem& p = call.problem;
  const Positives positive = positives_of_rows(p);
  const int64_t i0 = int64_t(blockIdx.x) * PAIR_TILE;
  const int warp = threadIdx.x / 32;

  float top[R], sum[R], matched[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    top[r] = minus_infinity();
    sum[r] = matched[r] = 0.0f;
  }
  for (int64_t j0 = 0; j0 < p.columns; j0 += PAIR_TILE) {
    float s[R][C], match[R][C];
    pair_products(p.x, p.rows, p.y, p.columns, p.width, i0, j0, x_slice, y_slice, s);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r;
      float high = minus_infinity();
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t j = j0 + thread_column() + 16 * c;
        const bool there = i < p.rows && j < p.columns;
        s[r][c] = there ? s[r][c] * p.scale : minus_infinity();
        match[r][c] = there && positive(i, j) ? s[r][c] : 0.0f;
        matched[r] += match[r][c];
        high = fmaxf(high, s[r][c]);
      }
      add_to_row(s[r], high, top[r], sum[r]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {  // the 8 rows of this warp
      float high = minus_infinity(), total = 0.0f, matches = 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) high = fmaxf(high, s[r][c]);
      high = fmaxf(high, __shfl_xor_sync(all_lanes, high, 16));
#pragma unroll
      for (int r = 0; r < R; ++r) {
        total += high == minus_infinity() ? 0.0f : expf(s[r][c] - high);
        matches += match[r][c];
      }
      total += __shfl_xor_sync(all_lanes, total, 16);
      matches += __shfl_xor_sync(all_lanes, matches, 16);
      if (threadIdx.x % 32 < 16) warp_parts[warp * PAIR_TILE + thread_column() + 16 * c] = {high, total, matches};
    }
    __syncthreads();
    if (threadIdx.x < PAIR_TILE && j0 + threadIdx.x < p.columns) {
      ColumnPart whole{minus_infinity(), 0.0f, 0.0f};
      for (int w = 0; w < PAIR_WARPS; ++w)
        whole.maximum = fmaxf(whole.maximum, warp_parts[w * PAIR_TILE + threadIdx.x].maximum);
      for (int w = 0; w < PAIR_WARPS; ++w) {
        const ColumnPart part = warp_parts[w * PAIR_TILE + threadIdx.x];
        if (part.sum > 0.0f) whole.sum += part.sum * expf(part.maximum - whole.maximum);
        whole.positives += part.positives;
      }
      parts[int64_t(blockIdx.x) * p.columns + j0 + threadIdx.x] = whole;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    const float matches = row_sum(matched[r]);
    if (i >= p.rows || thread_column() != 0) continue;
    const float lse = top[r] + logf(sum[r]), share = row_share[i];
    call.row_lse[i] = lse;
    call.row_values[i] = share > 0.0f ? lse - matches * share : 0.0f;
  }
}

__global__ void __launch_bounds__(TILE_THREADS) softmax_columns_kernel(PairForward call, const float* column_share,
                                                                       const ColumnPart* parts, int64_t count) {
  const int64_t j = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x, columns = call.problem.columns;
  if (j >= columns) return;
  float top = minus_infinity(), sum = 0.0f, matches = 0.0f;
  for (int64_t k = 0; k < count; ++k) top = fmaxf(top, parts[k * columns + j].maximum);
  for (int64_t k = 0; k < count; ++k) {
    const ColumnPart part = parts[k * columns + j];
    if (part.sum > 0.0f) sum += part.sum * expf(part.maximum - top);
    matches += part.positives;
  }
  const float lse = top + logf(sum), share = column_share[j];
  call.column_lse[j] = lse;
  call.column_values[j] = share > 0.0f ? lse - matches * share : 0.0f;
}

__global__ void __launch_bounds__(TILE_THREADS) sigmoid_forward_kernel(PairForward call, float* parts) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, x_slice);
  float* y_slice = x_slice + PAIR_SLICE_FLOATS;
  float* warp_parts = y_slice + PAIR_SLICE_FLOATS;  // [warps, 64]
  const PairProblem& p = call.problem;
  const Positives positive = positives_of_rows(p);
  const int64_t i0 = int64_t(blockIdx.x) * PAIR_TILE;
  double sum[R] = {};
  for (int64_t j0 = 0; j0 < p.columns; j0 += PAIR_TILE) {
    float s[R][C], column[C] = {};
    pair_products(p.x, p.rows, p.y, p.columns, p.width, i0, j0, x_slice, y_slice, s);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r;
      float part = 0.0f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t j = j0 + thread_column() + 16 * c;
        if (i >= p.rows || j >= p.columns) continue;
        const float z = fmaf(s[r][c], p.scale, p.bias), wrong = positive(i, j) ? -z : z;
        const float term = fmaxf(wrong, 0.0f) + log1pf(expf(-fabsf(wrong)));
        part += term;
        column[c] += term;
      }
      sum[r] += part;
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      column[c] += __shfl_xor_sync(all_lanes, column[c], 16);
      if (threadIdx.x % 32 < 16) warp_parts[threadIdx.x / 32 * PAIR_TILE + thread_column() + 16 * c] = column[c];
    }
    __syncthreads();
    if (threadIdx.x < PAIR_TILE && j0 + threadIdx.x < p.columns) {
      float whole = 0.0f;
      for (int w = 0; w < PAIR_WARPS; ++w) whole += warp_parts[w * PAIR_TILE + threadIdx.x];
      parts[int64_t(blockIdx.x) * p.columns + j0 + threadIdx.x] = whole;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    double total = sum[r];
#pragma unroll
    for (int bits = 8; bits > 0; bits /= 2) total += __shfl_xor_sync(all_lanes, total, bits);
    if (i < p.rows && thread_column() == 0) call.row_values[i] = float(total);
  }
}

__global__ void __launch_bounds__(TILE_THREADS) sigmoid_columns_kernel(PairForward call, const float* parts,
                                                                       int64_t count) {
  const int64_t j = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x, columns = call.problem.columns;
  if (j >= columns) return;
  double sum = 0.0;
  for (int64_t k = 0; k < count; ++k) sum += parts[k * columns + j];
  call.column_values[j] = float(sum);
}

}  // namespace vlm::cuda
