// Products of tiles in shared memory, exact float32. 256 threads as 16 x 16: thread (ty, tx) owns R rows from ty R on.
//
// T counts steps of 64 columns of the widest row. A row takes 64 T + 4 floats: 16 lanes that read 16 bytes of 16 rows
// meet no bank twice in a phase. Rows of a warp are its own, so what it wrote to them needs only __syncwarp.
#pragma once

#include "cuda/device.hpp"

namespace vlm::cuda {

constexpr int TILE_THREADS = 256;

template <int T>
constexpr int row_room = 64 * T + 4;

VLM_DEVICE int thread_row() { return int(threadIdx.x) / 16; }
VLM_DEVICE int thread_column() { return int(threadIdx.x) % 16; }

VLM_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// rows x 64 T of global memory; what is outside of [count, width) or does not exist becomes 0, whatever lies there.
template <int T, class Exists>
VLM_DEVICE void load_tile(float* to, int rows, const float* from, int64_t row_stride, int64_t count, int64_t width,
                          Exists exists) {
#pragma unroll 4
  for (int at = threadIdx.x; at < rows * 64 * T; at += TILE_THREADS) {
    const int row = at / (64 * T), column = at % (64 * T);
    const bool there = row < count && column < width && exists(row);
    to[row * row_room<T> + column] = there ? from[row * row_stride + column] : 0.0f;
  }
}

VLM_DEVICE bool always(int) { return true; }

// s[r][c] += <row ty R + r of x, row tx + 16 c of y> over `width` columns, a multiple of 4.
template <int R, int C>
VLM_DEVICE void tile_dot(const float* x, const float* y, int room, int width, float (&s)[R][C]) {
  x += thread_row() * R * room;
  y += thread_column() * room;
#pragma unroll 2
  for (int e = 0; e < width; e += 4) {
    float4 a[R], b[C];
#pragma unroll
    for (int r = 0; r < R; ++r) a[r] = load4(x + r * room + e);
#pragma unroll
    for (int c = 0; c < C; ++c) b[c] = load4(y + 16 * c * room + e);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        s[r][c] = fmaf(a[r].x, b[c].x, s[r][c]);
        s[r][c] = fmaf(a[r].y, b[c].y, s[r][c]);
        s[r][c] = fmaf(a[r].z, b[c].z, s[r][c]);
        s[r][c] = fmaf(a[r].w, b[c].w, s[r][c]);
      }
  }
}

template <int R, int C>
VLM_DEVICE void clear(float (&s)[R][C]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c) s[r][c] = 0.0f;
}

// Rows of an output tile in registers: row ty R + r, columns 4 tx + 64 t + n.
template <int R, int T>
struct Accumulator {
  float at[R][T][4];

  VLM_DEVICE void clear() { scale_all(0.0f); }
  VLM_DEVICE void scale_all(float factor) {
#pragma unroll
    for (int r = 0; r < R; ++r) scale(r, factor);
  }
  VLM_DEVICE void scale(int r, float factor) {
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int n = 0; n < 4; ++n) at[r][t][n] = factor == 0.0f ? 0.0f : at[r][t][n] * factor;
  }

  // += w y with w [rows, n] and y [n, 64 T]; n is a multiple of 4.
  VLM_DEVICE void add_product(const float* w, int w_room, const float* y, int n) {
    w += thread_row() * R * w_room;
    y += 4 * thread_column();
#pragma unroll 1
    for (int j = 0; j < n; j += 4) {
      float4 weights[R];
#pragma unroll
      for (int r = 0; r < R; ++r) weights[r] = load4(w + r * w_room + j);
      add_row<0>(weights, y + j * row_room<T>);
      add_row<1>(weights, y + (j + 1) * row_room<T>);
      add_row<2>(weights, y + (j + 2) * row_room<T>);
      add_row<3>(weights, y + (j + 3) * row_room<T>);
    }
  }

  template <int part>
  VLM_DEVICE void add_row(const float4 (&weights)[R], const float* y) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const float4 value = load4(y + 64 * t);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float w = part == 0 ? weights[r].x : part == 1 ? weights[r].y : part == 2 ? weights[r].z : weights[r].w;
        at[r][t][0] = fmaf(w, value.x, at[r][t][0]);
        at[r][t][1] = fmaf(w, value.y, at[r][t][1]);
        at[r][t][2] = fmaf(w, value.z, at[r][t][2]);
        at[r][t][3] = fmaf(w, value.w, at[r][t][3]);
      }
    }
  }

  VLM_DEVICE void store_row(float* to, int r, int64_t width, float factor) const {
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = 4 * thread_column() + 64 * t + n;
        if (column < width) to[column] = at[r][t][n] * factor;
      }
  }
};

// Write s to the tile [16 R, 16 C] that add_product reads; only the own warp reads it back.
template <int R, int C>
VLM_DEVICE void put_scores(float* w, int room, const float (&s)[R][C]) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c) w[(thread_row() * R + r) * room + thread_column() + 16 * c] = s[r][c];
}

// Over the 16 lanes that share a row.
VLM_DEVICE float row_sum(float value) {
#pragma unroll
  for (int bits = 8; bits > 0; bits /= 2) value += __shfl_xor_sync(all_lanes, value, bits);
  return value;
}
VLM_DEVICE float row_max(float value) {
#pragma unroll
  for (int bits = 8; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(all_lanes, value, bits));
  return value;
}

}  // namespace vlm::cuda
