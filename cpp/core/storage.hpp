// What a unit computes with: float32 numbers at most levels, bfloat16 storage at level avx512_bf16 (VLM_BFLOAT16),
// where the same drivers are compiled once more. Per-level code.
//
// A step is what a product takes of K at once: one number, or a word of two. Packed operands are counted in steps of
// four bytes each either way, and addressed as floats.
#pragma once

#ifdef VLM_BFLOAT16
#include "core/tile_bf16.hpp"
#else
#include "core/tile_gemm.hpp"
#endif

namespace vlm {
namespace VLM_LEVEL {

#ifdef VLM_BFLOAT16

typedef Bfloat16 Element;
constexpr bool ROUNDS = true;  // tiles are rounded before they are multiplied

VLM_INLINE int64_t steps(int64_t n) { return pairs(n); }

// Left operand from rows. `factor` goes into it where that rounds nothing more, and otherwise into the product.
static void pack_left(const Element* source, int64_t stride, int64_t rows, int64_t columns, float, float* to,
                      const float* = nullptr) {
  pack_pair_rows(source, stride, rows, columns, to);
}
static void pack_right_transposed(const Element* source, int64_t stride, int64_t rows, int64_t columns,
                                  const uint8_t* keep, float* to, const float* = nullptr) {
  pack_pairs_transposed(source, stride, rows, columns, keep, to);
}
static void pack_right(const Element* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                       float* to, int64_t panel_stride, const float* = nullptr) {
  pack_pairs_plain(source, stride, rows, columns, keep, to, panel_stride);
}

// C = factor A B of packed operands, K in numbers; strides of A's groups and B's panels in steps.
static void multiply_packed(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c, float factor) {
  multiply_pairs<PairRows>(M, N, steps(K), a, MR * steps(K), b, NR * steps(K), c, LDS, factor, false);
}

// A tile of numbers as a left operand, in `room` steps of its own where it must be rounded.
VLM_INLINE int64_t tile_rows_room(int64_t rows) { return rows * (LDS / 2); }
VLM_INLINE int64_t tile_columns_room(int64_t rows) { return round_up(rows, 2) / 2 * LDS; }
static const float* as_rows(const float* tile, int64_t rows, int64_t n, float* room) {
  for (int64_t r = 0; r < rows; ++r) round_row(tile + r * LDS, n, room + r * (LDS / 2));
  return room;
}
static const float* as_columns(const float* tile, int64_t rows, int64_t n, float* room) {
  for (int64_t r = 0; r < rows; r += 2)
    round_two_rows(tile + r * LDS, r + 1 < rows ? tile + (r + 1) * LDS : nullptr, n, room + r / 2 * LDS);
  return room;
}

// C (+)= tile B, and C (+)= tile^T B, of what as_rows and as_columns gave. K counts columns, or rows, of the tile.
static void multiply_rows(int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t panel_stride,
                          float* c, int64_t ldc, bool accumulate) {
  multiply_pairs<PairTileRows>(M, N, steps(K), a, MR * (LDS / 2), b, panel_stride, c, ldc, 1.0f, accumulate);
}
static void multiply_columns(int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t panel_stride,
                             float* c, int64_t ldc, bool accumulate) {
  multiply_pairs<PairTileColumns>(M, N, steps(K), a, MR, b, panel_stride, c, ldc, 1.0f, accumulate);
}

#else

typedef float Element;
constexpr bool ROUNDS = false;

VLM_INLINE int64_t steps(int64_t n) { return n; }

static void pack_left(const Element* source, int64_t stride, int64_t rows, int64_t columns, float factor, float* to,
                      const float* row_scale = nullptr) {
  pack_rows(source, stride, rows, columns, factor, to, row_scale);
}
static void pack_right_transposed(const Element* source, int64_t stride, int64_t rows, int64_t columns,
                                  const uint8_t* keep, float* to, const float* row_scale = nullptr) {
  pack_transposed(source, stride, rows, columns, keep, to, row_scale);
}
static void pack_right(const Element* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                       float* to, int64_t panel_stride, const float* row_scale = nullptr) {
  pack_plain(source, stride, rows, columns, keep, to, panel_stride, row_scale);
}

static void multiply_packed(int64_t M, int64_t N, int64_t K, const float* a, const float* b, float* c, float) {
  multiply<PackedRows>(M, N, K, a, MR * K, b, NR * K, c, LDS, false);
}

VLM_INLINE int64_t tile_rows_room(int64_t) { return 0; }
VLM_INLINE int64_t tile_columns_room(int64_t) { return 0; }
VLM_INLINE const float* as_rows(const float* tile, int64_t, int64_t, float*) { return tile; }
VLM_INLINE const float* as_columns(const float* tile, int64_t, int64_t, float*) { return tile; }

static void multiply_rows(int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t panel_stride,
                          float* c, int64_t ldc, bool accumulate) {
  multiply<TileRows>(M, N, K, a, MR * LDS, b, panel_stride, c, ldc, accumulate);
}
static void multiply_columns(int64_t M, int64_t N, int64_t K, const float* a, const float* b, int64_t panel_stride,
                             float* c, int64_t ldc, bool accumulate) {
  multiply<TileColumns>(M, N, K, a, MR, b, panel_stride, c, ldc, accumulate);
}

#endif

}  // namespace VLM_LEVEL
}  // namespace vlm
