// Keys of scattered blocks side by side, as operands of the tile product. Per-level code.
#pragma once

#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "core/vector_math.hpp"
#include "selection/selection_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

VLM_INLINE const float* selected_head(const Heads& x, int64_t b, int64_t h) {
  return x.data + b * x.batch_stride + h * x.head_stride;
}

// Blocks [from, to) of a list, at most BC keys: `keys[i]` is the place of column i. Returns the number of columns.
VLM_INLINE int64_t columns_of(const SelectionProblem& p, const int32_t* list, int64_t from, int64_t to, int32_t* keys) {
  int64_t n = 0;
  for (int64_t i = from; i < to; ++i) {
    const int64_t start = list[i] * p.block_k, end = smaller(p.keys, start + p.block_k);
    for (int64_t j = start; j < end; ++j) keys[n++] = static_cast<int32_t>(j);
  }
  return n;
}

// Rows `keys` of a matrix, contiguous: to [count, width].
VLM_INLINE void gather_rows(const float* from, int64_t stride, const int32_t* keys, int64_t count, int64_t width,
                            float* to) {
  if (width == 0) return;  // then there may be no memory at all, which memcpy does not take
  for (int64_t r = 0; r < count; ++r)
    __builtin_memcpy(to + r * width, from + keys[r] * stride, width * sizeof(float));
}

}  // namespace VLM_LEVEL
}  // namespace vlm
