// Exact attention, streaming softmax forward and recomputing backward.
//
// q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, V] -> out [B, Hq, N, V], lse [B, Hq, N]. Hq is a multiple of Hk; query
// head h reads key head h / (Hq / Hk).
// Logit s_ij = cap(scale * <q_i, k_j>) + bias_ij + relative_ij, where cap(x) = softcap * tanh(x / softcap), or x if
// softcap is 0. Pair (i, j) is allowed if (not causal or j <= i + causal_offset) and (key_mask is null or
// key_mask[b, j] != 0) and the atoms allow it (vlm/mask.hpp). A removed pair has probability exactly 0, and the content
// of a key removed by key_mask is never read into a sum, so that NaN there cannot leak. A row without an allowed key:
// output 0, lse -inf, no gradient. lse_i = log sum_j exp(s_ij), natural logarithm.
//
// A bias of -inf removes its pair; a finite one never does, however low: where a row has no other, it is averaged over
// such pairs. Below -2.36e38 (-FLT_MAX in units of log 2) it counts as that number, so does lse.
//
// With `temperature` the product is that of unit vectors: scale * temperature_h * cos(q_i, k_j), where a vector shorter
// than 1e-12 is divided by 1e-12.
//
// bias is broadcast through strides of 0; its last axis is contiguous. Its gradient has the extents given in
// `bias_batch`, `bias_heads`, `bias_rows` (each 1 or full) and is summed over the others.
//
// relative holds one number for each relative position: relative_ij = relative[h][queries - 1 - i + j], of
// queries + keys - 1 numbers; or, with grid_columns > 0, for tokens on a grid of that many columns (and grid_rows rows,
// queries and keys both row by row), relative[h][(yj - yi + rows - 1) (2 columns - 1) + xj - xi + columns - 1].
//
// Dropout: P_ij is multiplied by 1 / keep_share, or by 0 where the hash of (seed, b, h, i, j) is below `drop_below`
// (core/random.hpp); lse is that of the undropped softmax.
//
// Numerics: float32 throughout; with `half`, q, k, v, out and their gradients are bfloat16, what is multiplied (the
// probabilities and the gradients of the scores, too) is rounded to bfloat16, and everything else stays float32.
// `half` goes with a level that multiplies bfloat16 (vlm/level.hpp) and with plain products, not with the cosine.
// Work is cut by shape alone: bits do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "vlm/mask.hpp"
#include "vlm/view.hpp"

namespace vlm {

struct AttentionProblem {
  int64_t batch, query_heads, key_heads, queries, keys, width, value_width;
  Heads q, k, v;
  float scale;
  bool causal;
  int64_t causal_offset;     // keys - queries for bottom-right alignment, 0 for top-left
  const uint8_t* key_mask;   // [batch, keys] with row stride key_mask_stride, nonzero = may be attended; or null
  int64_t key_mask_stride;
  Heads bias;                // data null = none; row_stride 0 = the same for all queries
  const MaskAtom* atoms = nullptr;
  int64_t atom_count = 0;
  float softcap = 0.0f;
  bool half = false;                 // q, k, v, out, dout, dq, dk and dv point to bfloat16
  const float* relative = nullptr;
  int64_t relative_head_stride = 0;  // 0 = the same for all heads
  int64_t grid_rows = 0, grid_columns = 0;
  uint32_t drop_below = 0;           // 0 = no dropout
  float keep_share = 1.0f;
  uint64_t seed = 0;
  const float* temperature = nullptr;  // null = plain products
  int64_t temperature_stride = 0;      // 0 = the same for all heads
};

struct AttentionForward {
  AttentionProblem problem;
  MutableHeads out;
  float* lse;  // [batch, query_heads, queries], contiguous
  float* top = nullptr;      // of the same extents, or null: the greatest logit of each row in units of log 2 ...
  float* log_sum = nullptr;  // ... and the logarithm, to base 2, of the sum of 2^(logit - top); with `top`
};

struct AttentionBackward {
  AttentionProblem problem;
  Heads out;
  const float* lse;
  Heads dout;
  const float* dlse;  // contiguous like lse, or null for zero
  MutableHeads dq, dk, dv;
  float* dbias;       // [bias_batch, bias_heads, bias_rows, keys], contiguous, or null if not wanted
  int64_t bias_batch, bias_heads, bias_rows;
  float* drelative = nullptr;  // [query_heads or 1 as in the problem, its length], contiguous, or null if not wanted
  float* dtemperature = nullptr;  // [query_heads, or 1 if shared], or null if not wanted
};

// Both throw std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void attention_forward(const AttentionForward& call, int threads);
void attention_backward(const AttentionBackward& call, int threads);

}  // namespace vlm
