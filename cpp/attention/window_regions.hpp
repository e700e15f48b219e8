// Windows of a map cut into regions, and the bias of a region's pairs. Per-level code.
//
// A region is a rectangle of a window whose positions see one another, and nothing else: what the roll brought from the
// other side of the map, and what lies beyond the map, is not in it. So no kernel knows a mask.
#pragma once

#include "core/tile_gemm.hpp"
#include "vlm/window_attention.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int64_t WINDOWS = 16;  // of a task: enough to repay the bias of its pairs

struct Region {
  int64_t row, column;      // in the map
  int64_t rows, columns;
  int64_t top, left;        // in the window
};

VLM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of one axis of window number `window`: at most two. Returns how many.
VLM_INLINE int axis_parts(int64_t window, int64_t size, int64_t window_size, int64_t shift, int64_t (&start)[2],
                          int64_t (&length)[2], int64_t (&inside)[2]) {
  const int64_t padded = ceil_div(size, window_size) * window_size;
  const int64_t begin = window * window_size + shift;
  int parts = 0;
  const int64_t before = smaller(begin + window_size, size) - begin;  // up to the edge of the map
  if (before > 0) {
    start[parts] = begin;
    length[parts] = before;
    inside[parts++] = 0;
  }
  const int64_t wrapped = begin + window_size - padded;  // what the roll brought from the beginning
  if (wrapped > 0) {
    start[parts] = 0;
    length[parts] = smaller(wrapped, size);
    inside[parts++] = window_size - wrapped;
  }
  return parts;
}

struct Regions {
  Region part[4];
  int count;
};

VLM_INLINE Regions regions_of(const WindowAttentionProblem& p, int64_t window) {
  const int64_t across = ceil_div(p.columns, p.window_columns);
  int64_t y[2], h[2], top[2], x[2], w[2], left[2];
  const int down = axis_parts(window / across, p.rows, p.window_rows, p.shift_rows, y, h, top);
  const int side = axis_parts(window % across, p.columns, p.window_columns, p.shift_columns, x, w, left);
  Regions out{};
  for (int a = 0; a < down; ++a)
    for (int b = 0; b < side; ++b) out.part[out.count++] = {y[a], x[b], h[a], w[b], top[a], left[b]};
  return out;
}

VLM_INLINE int64_t positions_of(const Region& r) { return r.rows * r.columns; }

// Sizes that follow from the problem.
struct Shape {
  int64_t positions, stride;  // N; its row stride in a bias matrix
  int64_t tiles;              // of BC columns
  int64_t windows, blocks;    // of one map; tasks of a head
  int64_t offsets;            // rows of the bias table
  int64_t padded_width;       // D rounded up to W
};

VLM_INLINE Shape shape_of(const WindowAttentionProblem& p) {
  Shape s;
  s.positions = p.window_rows * p.window_columns;
  s.stride = round_up(s.positions, W);
  s.tiles = ceil_div(s.positions, BC);
  s.windows = ceil_div(p.rows, p.window_rows) * ceil_div(p.columns, p.window_columns);
  s.blocks = ceil_div(p.batch * s.windows, WINDOWS);
  s.offsets = (2 * p.window_rows - 1) * (2 * p.window_columns - 1);
  s.padded_width = round_up(p.width, W);
  return s;
}

// Row of the bias table for the pair of positions (y, x) and (v, u) of a window.
VLM_INLINE int64_t offset_of(const WindowAttentionProblem& p, int64_t y, int64_t x, int64_t v, int64_t u) {
  return (y - v + p.window_rows - 1) * (2 * p.window_columns - 1) + x - u + p.window_columns - 1;
}

// to [N, stride]: the bias of every pair of a window, -infinity beyond column N.
static void expand_bias(const WindowAttentionProblem& p, const Shape& s, int64_t head, float* to) {
  for (int64_t i = 0; i < s.positions; ++i, to += s.stride) {
    const int64_t y = i / p.window_columns, x = i % p.window_columns;
    int64_t j = 0;
    for (int64_t v = 0; v < p.window_rows; ++v)
      for (int64_t u = 0, at = offset_of(p, y, x, v, 0); u < p.window_columns; ++u)
        to[j++] = p.bias_table[(at - u) * p.heads + head];
    for (; j < s.stride; ++j) to[j] = -infinity;
  }
}

// The rows and columns of the bias matrix that belong to a region, [n, round_up(n, W)], -infinity beyond column n.
static void region_bias(const WindowAttentionProblem& p, const Shape& s, const Region& r, const float* whole,
    float* to) {
  const int64_t n = positions_of(r), stride = round_up(n, W);
  for (int64_t a = 0; a < r.rows; ++a)
    for (int64_t b = 0; b < r.columns; ++b, to += stride) {
      const float* from = whole + ((r.top + a) * p.window_columns + r.left + b) * s.stride;
      int64_t j = 0;
      for (int64_t v = 0; v < r.rows; ++v) {
        const float* run = from + (r.top + v) * p.window_columns + r.left;
        for (int64_t u = 0; u < r.columns; ++u) to[j++] = run[u];
      }
      for (; j < stride; ++j) to[j] = -infinity;
    }
}

// Rows of a region, D channels each, side by side: to [n, D].
static void gather(const float* map, int64_t row_stride, int64_t column_stride, const Region& r, int64_t width,
    float* to) {
  for (int64_t a = 0; a < r.rows; ++a)
    for (int64_t b = 0; b < r.columns; ++b, to += width) {
      const float* from = map + (r.row + a) * row_stride + (r.column + b) * column_stride;
      int64_t c = 0;
      for (; c + W <= width; c += W) store(to + c, load(from + c));
      for (; c < width; ++c) to[c] = from[c];
    }
}

VLM_INLINE float dot(const float* a, const float* b, int64_t n) {
  vf sum{};
  int64_t c = 0;
  for (; c + W <= n; c += W) sum += load(a + c) * load(b + c);
  float total = sum_lanes(sum);
  for (; c < n; ++c) total += a[c] * b[c];
  return total;
}

// Rows [n, D] to unit length in place; inverse[i] = 1 / max(length, 1e-12).
static void unit_rows(float* x, int64_t n, int64_t width, float* inverse) {
  for (int64_t i = 0; i < n; ++i, x += width) {
    const float length = __builtin_sqrtf(dot(x, x, width));
    const float by = 1.0f / (length > 1e-12f ? length : 1e-12f);
    inverse[i] = by;
    int64_t c = 0;
    for (; c + W <= width; c += W) store(x + c, load(x + c) * by);
    for (; c < width; ++c) x[c] *= by;
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
