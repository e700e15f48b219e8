// Products of tall matrices stored as bfloat16 with float32 results, for losses over a vocabulary.
//
// hidden h [R, E], weight w [V, E], both bfloat16 with a contiguous last axis.
//   product_rows       z_iv = <h_i, w_v>                     z [R, V] float32, written
//   product_gradients  dh_i = sum_v g_iv w_v                 dh [R, E] float32, written
//                      dw_v += sum_i g_iv h_i                dw [V, E] float32, added to
// where g [R, V] is given in float32 and rounded to bfloat16 on the way, a tile at a time.
//
// Numerics: exact products of bfloat16, float32 sums. The work is cut by shape alone: bits do not depend on the number
// of threads. Extra memory: h packed once or twice; for each thread a packed tile of 256 rows of w and one of g; for
// dh at most 8 partial sums [R, E].
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

struct HalfMatrix {  // bfloat16 [rows, columns]
  const uint16_t* data;
  int64_t row_stride;
};

struct HalfProduct {
  int64_t rows, ids, width;
  HalfMatrix hidden, weight;
  MutableMatrix z;
};

struct HalfProductGradients {
  int64_t rows, ids, width;
  HalfMatrix hidden, weight;
  Matrix gradient;
  MutableMatrix d_hidden;  // data null if not wanted
  MutableMatrix d_weight;  // data null if not wanted
};

// Both throw std::invalid_argument on negative sizes and where the level in force does not multiply bfloat16
// (vlm/level.hpp), std::bad_alloc without memory. threads >= 1.
void product_rows(const HalfProduct& call, int threads);
void product_gradients(const HalfProductGradients& call, int threads);

}  // namespace vlm
