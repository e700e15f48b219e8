// What the row kernels share: the last incomplete vector, exponentials with their sum. Per-level code.
#pragma once

#include "core/simd.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int64_t SUM_BLOCK = 1024;  // elements whose sum stays in float32; a multiple of every W

VLM_INLINE vf only_first(vf v, int64_t count, float other) {
  return select(lane_numbers() < splat_int(static_cast<int32_t>(count)), v, splat(other));
}

static inline void fill(float* row, int64_t count, float value) {
  for (int64_t c = 0; c < count; ++c) row[c] = value;
}

// Sum of exp((x - top) * scale); Keep: they take the place of the row.
template <bool Keep>
static double exponentials(float* row, int64_t count, float top, float scale) {
  double sum = 0.0;
  for (int64_t block = 0; block < count; block += SUM_BLOCK) {
    const int64_t end = smaller(count, block + SUM_BLOCK);
    vf part{};
    int64_t c = block;
    for (; c + W <= end; c += W) {
      const vf e = exp((load(row + c) - top) * scale);
      if constexpr (Keep) store(row + c, e);
      part += e;
    }
    if (c < end) {
      const int64_t left = end - c;
      const vf e = exp((only_first(load_first(row + c, left), left, -infinity) - top) * scale);
      if constexpr (Keep) store_first(row + c, e, left);
      part += e;
    }
    sum += sum_lanes(part);
  }
  return sum;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
