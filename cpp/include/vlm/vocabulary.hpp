// Rows of vocabulary logits: losses and gradients, in place, over a chunk of rows that a matrix product has just
// filled.
//
// R rows, V ids. The chunk t [R, V] holds products <h_i, w_v>; the logits are z_iv = t_iv + bias_v, or, with a cap c,
// z_iv = c tanh((t_iv + bias_v) / c). L_i = logsumexp_v z_iv.
//
// Cross-entropy: l_i = L_i - (1 - e) z_iy - (e / V) sum_v z_iv + k L_i^2 with smoothing e and z-loss k; without a label
// (y = -1), l_i = L_i + k L_i^2 and e is not used. A label whose logit is -inf gives +inf. A row of -inf: L_i -inf, l_i
// +inf, no gradient.
// Gradient: t_iv becomes f_i [p_iv (1 + 2 k L_i) - (1 - e) 1[v = y] - e / V] (1 - (z_iv / c)^2), f_i the row's factor.
//
// Divergence: rows of student and teacher, S = softmax(s / T), Q = softmax(t / T); the formulas are at `Divergence`. An
// id at -inf in either is left out of both. The student's row becomes f_i times the gradient of the value.
//
// Numerics: float32 elements; sums of a row are collected in double from blocks of 1024 elements.
// Rows are independent of each other, so the bits do not depend on the number of threads. No extra memory.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

struct CrossEntropyRows {
  int64_t rows, ids;
  MutableMatrix chunk;     // [rows, ids], overwritten by the gradient if `gradient`, else unspecified afterwards
  const float* bias;       // [ids] or null
  const int64_t* labels;   // [rows], -1 for none
  const float* factors;    // [rows] or null for 1
  float smoothing, z_loss, softcap;  // softcap 0: none
  bool gradient;
  float* loss;             // [rows], not multiplied by the factor
  float* log_p;            // [rows]: z_iy - L_i (-inf in a row of -inf), 0 without a label
  float* lse;              // [rows]: L_i
};

// M is the mixture. forward KL(Q || S); reverse KL(S || Q); symmetric (1 - m) forward + m reverse;
// js (1 - m) KL(Q || M) + m KL(S || M) with M = (1 - m) Q + m S; skew KL(Q || m Q + (1 - m) S); tv half of sum |Q - S|.
enum class Divergence : int { forward = 0, reverse = 1, symmetric = 2, js = 3, skew = 4, tv = 5 };

struct DivergenceRows {
  int64_t rows, ids;
  MutableMatrix student;  // [rows, ids] logits, overwritten by the gradient if `gradient`, else unspecified afterwards
  MutableMatrix teacher;  // [rows, ids] logits, unspecified afterwards
  const float* factors;   // [rows] or null for 1
  Divergence kind;
  float temperature, mix;
  bool gradient;
  float* value;           // [rows], not multiplied by the factor
};

// Both throw std::invalid_argument on negative sizes, labels outside of -1..ids-1, and options outside of their range.
void cross_entropy_rows(const CrossEntropyRows& call, int threads);
void divergence_rows(const DivergenceRows& call, int threads);

}  // namespace vlm
