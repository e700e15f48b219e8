// Products of tall float32 matrices for losses over a vocabulary, by the tile product of this core.
//
// hidden h [R, E], weight w [V, E], both with a contiguous last axis.
//   product_rows       z_iv = <h_i, w_v>                     z [R, V], written
//   product_gradients  dh_i = sum_v g_iv w_v                 dh [R, E], written
//                      dw_v += sum_i g_iv h_i                dw [V, E], added to
// Numerics: float32 sums. The work is cut by shape alone: bits do not depend on the number of threads. Extra memory: h
// packed once; for each thread a packed tile of 256 rows of w and one of g; for dh at most 8 partial sums [R, E].
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

struct FloatProduct {
  int64_t rows, ids, width;
  Matrix hidden, weight;
  MutableMatrix z;
};

struct FloatProductGradients {
  int64_t rows, ids, width;
  Matrix hidden, weight;
  Matrix gradient;
  MutableMatrix d_hidden;  // data null if not wanted
  MutableMatrix d_weight;  // data null if not wanted
};

// Both throw std::invalid_argument on negative sizes and std::bad_alloc without memory. threads >= 1.
void product_rows(const FloatProduct& call, int threads);
void product_gradients(const FloatProductGradients& call, int threads);

}  // namespace vlm
