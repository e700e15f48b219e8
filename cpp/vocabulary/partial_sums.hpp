// The gradient of `hidden` from partial sums over stretches of ids, added in their order. Per-level code.
#pragma once

#include "core/parallel_for.hpp"
#include "core/simd.hpp"
#include "vlm/view.hpp"

namespace vlm {
namespace VLM_LEVEL {

// d_hidden [rows, width] <- sum of `count` parts [rows, stride], which lie `room` floats apart.
VLM_INLINE void sum_parts(const float* parts, int64_t count, int64_t room, int64_t stride, int64_t rows, int64_t width,
                          const MutableMatrix& d_hidden, int threads) {
  parallel_for(rows, 16, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t e = 0; e < width; e += W) {
        vf sum{};
        for (int64_t k = 0; k < count; ++k) sum += load(parts + k * room + i * stride + e);
        store_first(d_hidden.data + i * d_hidden.row_stride + e, sum, width - e);
      }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
