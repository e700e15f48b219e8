// The packed tile product that every operator of the family is made of: C[M, N] (+)= A[M, K] B[K, N]. Per-level code.
//
// B is always in panels of NR columns, [panel][K][NR], zero-padded; C has row stride `ldc` and room for N rounded up
// to W. A comes in three layouts, named by where the operand comes from:
//   PackedRows   [group][K][MR]: rows of an input, interleaved by `interleave<MR>`;
//   TileRows     a score tile as it lies, row i of the product = row i of the tile (row stride LDS);
//   TileColumns  the same tile transposed: row i of the product = column i of the tile.
#pragma once

#include "core/memory.hpp"
#include "core/simd.hpp"

namespace vlm {
namespace VLM_LEVEL {

// Rows of the register tile: 28 (AVX-512) or 12 accumulators of 32 or 16 registers.
constexpr int MR = W == 16 ? 14 : 6;
constexpr int NV = 2;                 // vectors across the register tile
constexpr int NR = NV * W;
constexpr int BC = 256;       // columns of a score tile
constexpr int LDS = BC + W;   // its row stride: off a power of two, so that rows do not share cache sets

struct PackedRows {
  static constexpr int row_step = 1, k_step = MR;
};
struct TileRows {
  static constexpr int row_step = LDS, k_step = 1;
};
struct TileColumns {
  static constexpr int row_step = 1, k_step = LDS;
};

template <class A, int M, int V>
static __attribute__((noinline)) void register_tile(int64_t K, const float* __restrict a, const float* __restrict b,
                                                    float* __restrict c, int64_t ldc, bool accumulate) {
  vf sum[M][V];
  if (accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = load(c + m * ldc + v * W);
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = vf{};
  }
  for (int64_t k = 0; k < K; ++k) {
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf value = splat(a[m * A::row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] += value * column[v];
    }
    a += A::k_step;
    b += NR;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * W, sum[m][v]);
}

using RegisterTile = void (*)(int64_t, const float*, const float*, float*, int64_t, bool);

template <class A, int V>
VLM_INLINE RegisterTile register_tile_for(int64_t rows) {
  if constexpr (MR == 14) {
    static constexpr RegisterTile tiles[14] = {
        register_tile<A, 1, V>,  register_tile<A, 2, V>,  register_tile<A, 3, V>,  register_tile<A, 4, V>,
        register_tile<A, 5, V>,  register_tile<A, 6, V>,  register_tile<A, 7, V>,  register_tile<A, 8, V>,
        register_tile<A, 9, V>,  register_tile<A, 10, V>, register_tile<A, 11, V>, register_tile<A, 12, V>,
        register_tile<A, 13, V>, register_tile<A, 14, V>};
    return tiles[rows - 1];
  } else {
    static constexpr RegisterTile tiles[6] = {register_tile<A, 1, V>, register_tile<A, 2, V>, register_tile<A, 3, V>,
                                              register_tile<A, 4, V>, register_tile<A, 5, V>, register_tile<A, 6, V>};
    return tiles[rows - 1];
  }
}

// C[M, round_up(N, W)] = A B, or += if accumulate. group_stride: distance of MR rows of A; panel_stride: of B's panels.
template <class A>
static void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t group_stride, const float* b,
                     int64_t panel_stride, float* c, int64_t ldc, bool accumulate) {
  for (int64_t m = 0; m < M; m += MR, a += group_stride) {
    const int64_t rows = smaller(MR, M - m);
    const RegisterTile wide = register_tile_for<A, NV>(rows), narrow = register_tile_for<A, 1>(rows);
    const float* panel = b;
    for (int64_t n = 0; n < N; n += NR, panel += panel_stride)
      (N - n > W ? wide : narrow)(K, a, panel, c + m * ldc + n, ldc, accumulate);
  }
}

// Rows of `source` side by side: to[k * Width + r] = scale * row_scale[r] * source[r][k], rows beyond `rows` 0.
// keep: per row, 0 means the row is taken as zeros without being read; may be null. row_scale null = all 1.
template <int Width>
static void interleave(const float* source, int64_t stride, int64_t rows, int64_t columns, float scale,
                       const uint8_t* keep, float* to, const float* row_scale = nullptr) {
  for (int64_t r0 = 0; r0 < Width; r0 += W) {
    for (int64_t k0 = 0; k0 < columns; k0 += W) {
      const int64_t count = smaller(W, columns - k0);
      // Rows are short and far apart, so the hardware does not foresee the next ones.
      for (int r = 0; r < W && r0 + r < Width; ++r) fetch_soon(source, (r0 + r + Width) * stride + k0);
      vf block[W];
      for (int r = 0; r < W; ++r) {
        const bool there = r0 + r < rows && r0 + r < Width && (keep == nullptr || keep[r0 + r] != 0);
        const float factor = there && row_scale != nullptr ? scale * row_scale[r0 + r] : scale;
        block[r] = there ? load_first(source + (r0 + r) * stride + k0, count) * factor : vf{};
      }
      transpose(block);
      for (int64_t k = 0; k < count; ++k) {
        float* at = to + (k0 + k) * Width + r0;
        // Width may be no multiple of W. The first sub-block may spill over what column k + 1 is about to write.
        if (r0 + W <= Width || (r0 == 0 && k0 + k + 1 < columns))
          store(at, block[k]);
        else
          store_first(at, block[k], Width - r0);
      }
    }
  }
}

// Groups of MR rows, [group][columns][MR], for PackedRows.
VLM_INLINE int64_t packed_rows_room(int64_t rows, int64_t columns) { return round_up(rows, MR) * columns; }
static void pack_rows(const float* source, int64_t stride, int64_t rows, int64_t columns, float scale, float* to,
                      const float* row_scale = nullptr) {
  for (int64_t r = 0; r < rows; r += MR, to += MR * columns)
    interleave<MR>(source + r * stride, stride, smaller(MR, rows - r), columns, scale, nullptr, to,
                   row_scale == nullptr ? nullptr : row_scale + r);
}

// B operand from the rows of `source` as columns (B = source^T): [panel][columns of source][NR].
VLM_INLINE int64_t panels_room(int64_t n, int64_t k) { return round_up(n, NR) * k; }
static void pack_transposed(const float* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                            float* to, const float* row_scale = nullptr) {
  for (int64_t r = 0; r < rows; r += NR, to += NR * columns)
    interleave<NR>(source + r * stride, stride, smaller(NR, rows - r), columns, 1.0f,
                   keep == nullptr ? nullptr : keep + r, to, row_scale == nullptr ? nullptr : row_scale + r);
}

// B operand from `source` as it lies (B = source): panel p at to + p * panel_stride, [rows][NR], zero-padded columns.
static void pack_plain(const float* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                       float* to, int64_t panel_stride, const float* row_scale = nullptr) {
  for (int64_t c = 0; c < columns; c += NR, to += panel_stride) {
    const int64_t first = smaller(W, columns - c), second = smaller(W, columns - c - first);
    for (int64_t r = 0; r < rows; ++r) {
      const bool there = keep == nullptr || keep[r] != 0;
      const float* from = source + r * stride + c;
      fetch_soon(source, (r + 12) * stride + c);
      fetch_soon(source, (r + 12) * stride + c + W);
      const float factor = there && row_scale != nullptr ? row_scale[r] : 1.0f;
      store(to + r * NR, there ? load_first(from, first) * factor : vf{});
      store(to + r * NR + W, there && second > 0 ? load_first(from + W, second) * factor : vf{});
    }
  }
}

// Work memory of one call, freed with it.
struct Scratch {
  float* data;
  explicit Scratch(int64_t floats) : data(allocate_floats(floats)) {}
  ~Scratch() { release_floats(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace VLM_LEVEL
}  // namespace vlm
