// The best of many scores, without sorting. Per-level code.
#pragma once

#include "core/simd.hpp"

namespace vlm {
namespace VLM_LEVEL {

// Scores as integers of the same order. `order` has room for n rounded up to W, filled up with the lowest.
VLM_INLINE void order_of(const float* scores, int64_t n, int32_t* order) {
  for (int64_t i = 0; i < n; i += W) {
    const vi bits = as_int(load_first(scores + i, n - i) + 0.0f);  // -0 becomes 0
    const vi rank = bits ^ ((bits >> 31) & 0x7fffffff);
    __builtin_memcpy(order + i, &rank, sizeof(rank));
  }
  for (int64_t i = n; i < round_up(n, W); ++i) order[i] = INT32_MIN;
}

// What stays of n numbers: those above `border`, and the first `ties` of those equal to it.
struct Border {
  int32_t lowest;
  int64_t ties;
};

// The border of the m greatest of `order_of`, found bit by bit; 1 <= m <= n.
VLM_INLINE Border border_of(const int32_t* order, int64_t n, int64_t m) {
  uint32_t lowest = 0;  // as an unsigned number whose order is that of the scores
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    const int32_t tried = static_cast<int32_t>((lowest | bit) ^ 0x80000000u);
    vi counts{};
    for (int64_t i = 0; i < n; i += W) counts -= load(order + i) >= splat_int(tried);
    int64_t reached = 0;
    for (int l = 0; l < W; ++l) reached += counts[l];
    if (reached >= m) lowest |= bit;
  }
  const int32_t border = static_cast<int32_t>(lowest ^ 0x80000000u);
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += order[i] > border;
  return {border, m - above};
}

// Places of the m best of n scores, of equal ones the earlier, ascending into `best`. `order`: room as for order_of.
VLM_INLINE void best_places(const float* scores, int64_t n, int64_t m, int32_t* order, int32_t* best) {
  if (m == 0) return;
  order_of(scores, n, order);
  Border border = border_of(order, n, m);
  int64_t kept = 0;
  for (int64_t i = 0; kept < m; ++i)
    if (order[i] > border.lowest || (order[i] == border.lowest && border.ties-- > 0))
      best[kept++] = static_cast<int32_t>(i);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
