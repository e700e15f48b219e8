// Windowed cosine attention over a whole feature map (Swin Transformer V2).
//
// qkv [B, H, W, 3 h D], channels (q | k | v), then head, then width -> out [B, H, W, h D], lse [B, h, H, W].
// The map is padded below and right to H' x W', multiples of the window Wh x Ww, rolled up by shift_rows and left by
// shift_columns (each less than the window), and cut in windows. A padding position does not exist: it is not read, is
// never attended and has no output. Two positions of a window see one another only if the roll moved them alike: both
// wrapped around below or neither, both wrapped around at the right or neither. The region of a position is computed;
// no mask tensor exists, and pairs of different regions cost nothing.
//   logit_ij = tau_head * cos(q_i, k_j) + bias_table[(dy + Wh - 1)(2 Ww - 1) + dx + Ww - 1, head],
//   (dy, dx) = i - j in the window
//   cos(a, b) = <a / max(|a|, 1e-12), b / max(|b|, 1e-12)>
// lse_i = log sum_j exp(logit_ij), natural logarithm.
//
// Numerics: float32; sums over windows of the gradients of tau and bias_table in double, in an order that shape alone
// fixes, so bits do not depend on the number of threads.
// Memory: a task holds tiles of one window and the bias of all its pairs, N^2 floats for N = Wh Ww; backward also one
// bias table of float32 for each head and block of windows.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

struct WindowAttentionProblem {
  int64_t batch, rows, columns, heads, width;  // B, H, W, h, D
  int64_t window_rows, window_columns, shift_rows, shift_columns;
  Heads qkv;                // strides of map, row and column; the channels are contiguous
  const float* tau;         // [heads]
  const float* bias_table;  // [(2 Wh - 1)(2 Ww - 1), heads], contiguous
};

struct WindowAttentionForward {
  WindowAttentionProblem problem;
  float* out;  // contiguous
  float* lse;  // contiguous
};

struct WindowAttentionBackward {
  WindowAttentionProblem problem;
  const float* out;  // contiguous
  const float* lse;  // contiguous
  Heads dout;        // strides of map, row and column
  float* dqkv;       // [B, H, W, 3 h D], contiguous
  float* dtau;       // [heads]
  float* dbias_table;
};

// Both throw std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void window_attention_forward(const WindowAttentionForward& call, int threads);
void window_attention_backward(const WindowAttentionBackward& call, int threads);

}  // namespace vlm
