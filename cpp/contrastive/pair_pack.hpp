// Packing for the pairwise sweeps, from float32 or bfloat16 rows. Per-level code.
#pragma once

#include "core/kernel_table.hpp"
#include "core/parallel_for.hpp"
#include "core/storage.hpp"

namespace vlm {
namespace VLM_LEVEL {

// Rows of embeddings: `half` says that data points to bfloat16. Strides count elements.
struct Rows {
  const void* data;
  int64_t row_stride;
  bool half;
};

VLM_INLINE Rows rows_of(const Matrix& m, bool half) { return {m.data, m.row_stride, half}; }
VLM_INLINE float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// `rows` rows side by side as interleave does.
template <int Width>
static void interleave_rows(const Rows& source, int64_t first, int64_t rows, int64_t columns, float scale, float* to) {
  if (!source.half) {
    interleave<Width>(static_cast<const float*>(source.data) + first * source.row_stride, source.row_stride, rows,
                      columns, scale, nullptr, to);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source.data) + first * source.row_stride;
  constexpr int64_t step = 256;  // columns that are widened together
  float wide[Width * step];
  for (int64_t k0 = 0; k0 < columns; k0 += step) {
    const int64_t count = smaller(step, columns - k0);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < count; ++k) wide[r * step + k] = widen(from[r * source.row_stride + k0 + k]);
    interleave<Width>(wide, step, rows, count, scale, nullptr, to + k0 * Width);
  }
}

static void pack_row_groups(const Rows& source, int64_t first, int64_t rows, int64_t columns, float scale, float* to) {
  for (int64_t r = 0; r < rows; r += MR, to += MR * columns)
    interleave_rows<MR>(source, first + r, smaller(MR, rows - r), columns, scale, to);
}

// Rows [first, first + count) as panels of columns.
static void pack_panels(const Rows& source, int64_t first, int64_t count, int64_t columns, int threads, float* to) {
  parallel_for((count + NR - 1) / NR, 1, threads, [&](int64_t panel, int64_t, int) {
    interleave_rows<NR>(source, first + panel * NR, smaller(NR, count - panel * NR), columns, 1.0f,
                        to + panel * NR * columns);
  });
}

// Columns [c0, c1) of rows [first, first + count) as they lie, c0 a multiple of NR: panel p at to + p * panel_stride.
static void pack_as_is(const Rows& source, int64_t first, int64_t count, int64_t c0, int64_t c1, float* to,
                       int64_t panel_stride) {
  if (!source.half) {
    pack_plain(static_cast<const float*>(source.data) + first * source.row_stride + c0, source.row_stride, count,
               c1 - c0, nullptr, to + c0 / NR * panel_stride, panel_stride);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source.data) + first * source.row_stride;
  for (int64_t c = c0; c < c1; c += NR)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < NR; ++k)
        to[c / NR * panel_stride + r * NR + k] = c + k < c1 ? widen(from[r * source.row_stride + c + k]) : 0.0f;
}

// The two sides of the loss as operands of this level: bfloat16 as it is where the level multiplies it, and widened
// elsewhere.
#ifdef VLM_BFLOAT16

VLM_INLINE const Element* elements(const Rows& source, int64_t first) {
  return static_cast<const Element*>(source.data) + first * source.row_stride;
}
static void pack_side_rows(const Rows& source, int64_t first, int64_t rows, int64_t columns, float scale, float* to) {
  pack_left(elements(source, first), source.row_stride, rows, columns, scale, to);
}
static void pack_side_panels(const Rows& source, int64_t first, int64_t count, int64_t columns, int threads,
                             float* to) {
  parallel_for((count + NR - 1) / NR, 1, threads, [&](int64_t panel, int64_t, int) {
    pack_right_transposed(elements(source, first + panel * NR), source.row_stride, smaller(NR, count - panel * NR),
                          columns, nullptr, to + panel * NR * steps(columns));
  });
}
static void pack_side_as_is(const Rows& source, int64_t first, int64_t count, int64_t c0, int64_t c1, float* to,
                            int64_t panel_stride) {
  pack_right(elements(source, first) + c0, source.row_stride, count, c1 - c0, nullptr, to + c0 / NR * panel_stride,
             panel_stride);
}

#else

static void pack_side_rows(const Rows& source, int64_t first, int64_t rows, int64_t columns, float scale, float* to) {
  pack_row_groups(source, first, rows, columns, scale, to);
}
static void pack_side_panels(const Rows& source, int64_t first, int64_t count, int64_t columns, int threads,
                             float* to) {
  pack_panels(source, first, count, columns, threads, to);
}
static void pack_side_as_is(const Rows& source, int64_t first, int64_t count, int64_t c0, int64_t c1, float* to,
                            int64_t panel_stride) {
  pack_as_is(source, first, count, c0, c1, to, panel_stride);
}

#endif

}  // namespace VLM_LEVEL
}  // namespace vlm
