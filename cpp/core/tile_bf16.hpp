// The packed tile product on bfloat16 storage with float32 sums (vdpbf16ps). Per-level code of avx512_bf16 only.
//
// As tile_gemm.hpp, with pairs in the place of numbers: a word holds two bfloat16 that are neighbours along K, the
// even one in its low half, and K counts words. B is in panels [panel][K][NR] of words. A comes in three layouts:
//   PairRows         [group][K][MR] words: rows of an input;
//   PairTileRows     a tile rounded row by row (row stride LDS / 2 words): row i of the product = row i of the tile;
//   PairTileColumns  a tile rounded two rows at a time, [rows / 2][LDS] words: row i of the product = its column i.
// An odd number along K is completed by zero. Sums are rounded as those of fused multiply-adds, denormals are 0.
#pragma once

#include <immintrin.h>

#include "core/tile_gemm.hpp"

namespace vlm {
namespace VLM_LEVEL {

static_assert(W == 16, "bfloat16 products are made of 512-bit vectors");

typedef uint16_t Bfloat16;

VLM_INLINE int64_t pairs(int64_t n) { return (n + 1) / 2; }

struct PairRows {
  static constexpr int row_step = 1, k_step = MR;
};
struct PairTileRows {
  static constexpr int row_step = LDS / 2, k_step = 1;
};
struct PairTileColumns {
  static constexpr int row_step = 1, k_step = LDS;
};

VLM_INLINE __mmask32 first_halves(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}
VLM_INLINE __mmask16 first_words(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

// First `count` numbers from memory, the others 0; reads nothing beyond.
VLM_INLINE __m256i load_halves(const Bfloat16* p, int64_t count) {
  return _mm256_maskz_loadu_epi16(first_words(count), p);
}
VLM_INLINE vi as_words(__m256i halves) {  // each number in the low half of a word
  typedef uint16_t Halves __attribute__((vector_size(32)));
  return __builtin_convertvector((Halves)halves, vi);
}
VLM_INLINE vf load_first(const Bfloat16* p, int64_t count) { return as_float(as_words(load_halves(p, count)) << 16); }
VLM_INLINE void store_first(Bfloat16* p, vf v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_words(count), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
VLM_INLINE void fetch_soon(const Bfloat16* base, int64_t offset) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset) * sizeof(Bfloat16);
  __builtin_prefetch(reinterpret_cast<const void*>(at));
}

template <class A, int M, int V>
static __attribute__((noinline)) void pair_tile(int64_t K, const float* a, const float* b, float* c, int64_t ldc,
                                                float factor, bool accumulate) {
  __m512 sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = accumulate ? (__m512)load(c + m * ldc + v * W) : _mm512_setzero_ps();
  for (int64_t k = 0; k < K; ++k) {
    __m512bh column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t word;
      __builtin_memcpy(&word, a + m * A::row_step, sizeof(word));
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], pair, column[v]);
    }
    a += A::k_step;
    b += NR;
  }
  const vf scale = splat(accumulate ? 1.0f : factor);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * W, (vf)sum[m][v] * scale);
}

using PairTile = void (*)(int64_t, const float*, const float*, float*, int64_t, float, bool);

template <class A, int V>
VLM_INLINE PairTile pair_tile_for(int64_t rows) {
  static_assert(MR == 14, "one entry for each number of rows");
  static constexpr PairTile tiles[MR] = {
      pair_tile<A, 1, V>,  pair_tile<A, 2, V>,  pair_tile<A, 3, V>,  pair_tile<A, 4, V>,  pair_tile<A, 5, V>,
      pair_tile<A, 6, V>,  pair_tile<A, 7, V>,  pair_tile<A, 8, V>,  pair_tile<A, 9, V>,  pair_tile<A, 10, V>,
      pair_tile<A, 11, V>, pair_tile<A, 12, V>, pair_tile<A, 13, V>, pair_tile<A, 14, V>};
  return tiles[rows - 1];
}

// C[M, round_up(N, W)] = factor A B, or += A B if accumulate. Words are addressed as floats, and never read as such.
// group_stride: words between groups of MR rows of A; panel_stride: words between panels of B.
template <class A>
static void multiply_pairs(int64_t M, int64_t N, int64_t K, const float* a, int64_t group_stride, const float* b,
                           int64_t panel_stride, float* c, int64_t ldc, float factor, bool accumulate) {
  for (int64_t m = 0; m < M; m += MR, a += group_stride) {
    const int64_t rows = smaller(MR, M - m);
    const PairTile wide = pair_tile_for<A, NV>(rows), narrow = pair_tile_for<A, 1>(rows);
    const float* panel = b;
    for (int64_t n = 0; n < N; n += NR, panel += panel_stride)
      (N - n > W ? wide : narrow)(K, a, panel, c + m * ldc + n, ldc, factor, accumulate);
  }
}

// Rows of `source` side by side: word k of row r at to[k * Width + r], rows beyond `rows` and numbers beyond `columns`
// 0. keep: per row, 0 means the row is taken as zeros without being read; may be null.
template <int Width>
static void interleave_pairs(const Bfloat16* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                             float* to) {
  for (int64_t r0 = 0; r0 < Width; r0 += W) {
    const __mmask16 lanes = first_words(Width - r0);
    for (int64_t k0 = 0; k0 < columns; k0 += 2 * W) {
      const __mmask32 there = first_halves(columns - k0);
      for (int r = 0; r < W && r0 + r < Width; ++r) fetch_soon(source, (r0 + r + Width) * stride + k0);
      vf block[W];
      for (int r = 0; r < W; ++r) {
        const bool read = r0 + r < rows && r0 + r < Width && (keep == nullptr || keep[r0 + r] != 0);
        block[r] = read ? (vf)_mm512_maskz_loadu_epi16(there, source + (r0 + r) * stride + k0) : vf{};
      }
      transpose(block);
      const int64_t words = smaller(W, pairs(columns - k0));
      float* at = to + k0 / 2 * Width + r0;
      for (int64_t k = 0; k < words; ++k, at += Width) _mm512_mask_storeu_epi32(at, lanes, (__m512i)block[k]);
    }
  }
}

// Groups of MR rows, [group][pairs(columns)][MR], for PairRows.
static void pack_pair_rows(const Bfloat16* source, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += MR, to += MR * pairs(columns))
    interleave_pairs<MR>(source + r * stride, stride, smaller(MR, rows - r), columns, nullptr, to);
}

// B operand from the rows of `source` as columns (B = source^T): [panel][pairs(columns)][NR].
static void pack_pairs_transposed(const Bfloat16* source, int64_t stride, int64_t rows, int64_t columns,
                                  const uint8_t* keep, float* to) {
  for (int64_t r = 0; r < rows; r += NR, to += NR * pairs(columns))
    interleave_pairs<NR>(source + r * stride, stride, smaller(NR, rows - r), columns,
                         keep == nullptr ? nullptr : keep + r, to);
}

VLM_INLINE vf pair_up(__m256i even, __m256i odd) { return as_float(as_words(even) | as_words(odd) << 16); }

// B operand from `source` as it lies (B = source): panel p at to + p * panel_stride, [pairs(rows)][NR].
static void pack_pairs_plain(const Bfloat16* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                             float* to, int64_t panel_stride) {
  const __m256i nothing = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += NR, to += panel_stride) {
    const int64_t first = smaller(W, columns - c), second = larger(0, smaller(W, columns - c - first));
    for (int64_t r = 0; r < rows; r += 2) {
      const bool even = keep == nullptr || keep[r] != 0, odd = r + 1 < rows && (keep == nullptr || keep[r + 1] != 0);
      const Bfloat16 *from = source + r * stride + c, *next = from + stride;
      fetch_soon(source, (r + 12) * stride + c);
      fetch_soon(source, (r + 13) * stride + c);
      float* at = to + r / 2 * NR;
      store(at, pair_up(even ? load_halves(from, first) : nothing, odd ? load_halves(next, first) : nothing));
      store(at + W, pair_up(even && second > 0 ? load_halves(from + W, second) : nothing,
                            odd && second > 0 ? load_halves(next + W, second) : nothing));
    }
  }
}

// A row of a tile for PairTileRows: `count` numbers, then zeros up to a multiple of W.
VLM_INLINE __m256i rounded(vf v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
VLM_INLINE void round_row(const float* row, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += W)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c / 2), rounded(load_first(row + c, count - c)));
}

// Likewise two rows for PairTileColumns; the second one may be null for zeros.
VLM_INLINE void round_two_rows(const float* even, const float* odd, int64_t count, float* to) {
  for (int64_t c = 0; c < count; c += W) {
    const __m256i low = rounded(load_first(even + c, count - c));
    const __m256i high = odd == nullptr ? _mm256_setzero_si256() : rounded(load_first(odd + c, count - c));
    store(to + c, pair_up(low, high));
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
