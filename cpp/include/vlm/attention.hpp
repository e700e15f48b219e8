// Exact attention, streaming softmax forward and recomputing backward.
//
// q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, V] -> out [B, Hq, N, V], lse [B, Hq, N]. Hq is a multiple of Hk; query
// head h reads key head h / (Hq / Hk).
// Logit s_ij = scale * <q_i, k_j> + bias_ij. Pair (i, j) is allowed if (not causal or j <= i + causal_offset) and
// (key_mask is null or key_mask[b, j] != 0). A removed pair has probability exactly 0, and a removed key's content is
// never read into a sum, so that NaN there cannot leak. A row without an allowed key: output 0, lse -inf, no gradient.
// lse_i = log sum_j exp(s_ij), natural logarithm.
//
// bias is broadcast through strides of 0; its last axis is contiguous. Its gradient has the extents given in
// `bias_batch`, `bias_heads`, `bias_rows` (each 1 or full) and is summed over the others.
//
// Numerics: float32 throughout. Work is cut by shape alone: bits do not depend on the number of threads.
#pragma once

#include <cstdint>

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
};

struct AttentionForward {
  AttentionProblem problem;
  MutableHeads out;
  float* lse;  // [batch, query_heads, queries], contiguous
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
};

// Both throw std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void attention_forward(const AttentionForward& call, int threads);
void attention_backward(const AttentionBackward& call, int threads);

}  // namespace vlm
