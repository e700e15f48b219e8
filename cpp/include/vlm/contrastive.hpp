// Contrastive losses over all pairs of two sets of embeddings, tiled: no [R, C] buffer ever exists.
//
// R rows x [R, E], C columns y [C, E], logits z_ij = scale * <x_i, y_j> (+ bias for the sigmoid loss).
// Pair (i, j) is positive if row_ids[i] == column_ids[j]. Without ids the positive of row i is column i + row_offset.
// A pair that is not positive is excluded, takes no part in anything, if row_excluded[i] == column_excluded[j], or if
// the teacher's logit is above `similar`. The other pairs are kept. A teacher has logits u_ij = teacher_scale *
// <teacher_x_i, teacher_y_j> + teacher_bias and never gets a gradient.
//
// Softmax gives the statistics that every target distribution is made of, one row of numbers each, for rows (and
// likewise for columns, over i):
//   0 lse       logsumexp over kept j of z_ij; with `decoupled` over kept j that are not positive
//   1 positive  sum of z_ij over positive j            4 count        number of positive j
//   2 total     sum of z_ij over kept j                5 kept         number of kept j
//   3 teacher   sum over kept j of q_ij z_ij           6 teacher lse  logsumexp over kept j of u_ij
// with q_i = softmax over kept j of u_ij. 3 and 6 are 0 without a teacher; 2 and 5, and the gradient of 2, are 0 unless
// `full`, `decoupled`, exclusions or a teacher are given. 0, 3 and 6 of nothing kept are -inf, 0 and -inf.
// Sigmoid: term_ij = max(z, 0) - p z + log(1 + exp(-|z|)), p_ij = (1 - share) hard_ij + share * sigmoid(u_ij), where
// hard_ij is positive_label[i] (1 by default) on positives and negative_label[i] (0) elsewhere; terms of pairs that are
// not positive count negative_weight times. Row 0 of the statistics holds the sums over kept pairs.
//
// Backward takes the gradients of the numbers 0 to 3 (sigmoid: 0) and writes those of x, y, log(scale) and bias. Logits
// are recomputed. The statistics may be those of a larger problem of which these rows and columns are a part.
// Numerics: float32 products and sums inside a tile; sums across tiles that feed one scalar are in double. With `half`
// at a level that multiplies bfloat16 (vlm/level.hpp) x and y are multiplied as they are, and the gradients of the
// logits are rounded to bfloat16 before they meet them; elsewhere x and y are widened first.
// The work is cut by shape alone, so the bits of the result do not depend on the number of threads.
// Extra memory: a packed copy of x (of bfloat16 input: of 8 x 14 rows for each thread), of 256 columns, O(R + C)
// statistics for each of at most 32 row chunks, and in the backward a [256, E] block for each chunk.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

enum class PairLoss : int { softmax = 0, sigmoid = 1 };

constexpr int PAIR_NUMBERS = 7, PAIR_GRADIENTS = 4;  // of the softmax; the sigmoid has one of either

struct PairTeacher {
  int64_t width;
  Matrix x, y;           // float32; data null = no teacher
  float scale, bias;
  float share;           // sigmoid: of its labels in the labels
  float similar;         // logits above exclude a pair; infinity = none
};

struct PairProblem {
  int64_t rows, columns, width;
  Matrix x, y;
  bool half;                  // x and y hold bfloat16
  float scale;                // exp(log_scale)
  float bias;                 // sigmoid only
  const int64_t* row_ids;     // [rows] or null
  const int64_t* column_ids;  // [columns] or null, together with row_ids
  int64_t row_offset;         // used without ids
  const int64_t* row_excluded;  // [rows] or null
  const int64_t* column_excluded;
  bool decoupled;               // softmax
  bool full;                    // softmax
  const float* positive_label;  // sigmoid, [rows] or null, together with negative_label
  const float* negative_label;
  float negative_weight;        // sigmoid
  PairTeacher teacher;
};

struct PairForward {
  PairProblem problem;
  float* rows;     // [7, rows], sigmoid [1, rows]
  float* columns;  // [7, columns], sigmoid [1, columns]; null if not wanted
};

struct PairBackward {
  PairProblem problem;
  const float* rows;             // the statistics; softmax only
  const float* columns;          // softmax only
  const float* row_gradient;     // [4, rows], sigmoid [1, rows]
  const float* column_gradient;  // [4, columns], sigmoid [1, columns]; null = zeros
  MutableMatrix dx;              // float32 [rows, width], data may be null if not wanted
  MutableMatrix dy;              // [columns, width], data may be null
  double* dlog_scale;            // one number, never null
  double* dbias;                 // one number, sigmoid only, may be null
};

// Both throw std::invalid_argument on negative sizes and std::bad_alloc without memory. threads >= 1.
void pair_forward(PairLoss loss, const PairForward& call, int threads);
void pair_backward(PairLoss loss, const PairBackward& call, int threads);

}  // namespace vlm
