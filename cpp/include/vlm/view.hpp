// Raw strided views: what crosses the border of the core. Strides count elements; the last axis is contiguous.
// These types are shared by translation units of different instruction-set levels, so they have no member functions:
// an inline function emitted by the AVX-512 unit could be kept by the linker for everybody.
#pragma once

#include <cstdint>

namespace vlm {

struct Matrix {  // [rows, columns]
  const float* data;
  int64_t row_stride;
};

struct MutableMatrix {
  float* data;
  int64_t row_stride;
};

struct Heads {  // [batch, heads, length, width]
  const float* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct MutableHeads {
  float* data;
  int64_t batch_stride, head_stride, row_stride;
};

}  // namespace vlm
