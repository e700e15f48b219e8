// Contrastive losses over all pairs of two sets of embeddings, tiled: no [R, C] buffer ever exists.
//
// R rows x [R, E], C columns y [C, E], logits z_ij = scale * <x_i, y_j> (+ bias for the sigmoid loss).
// Pair (i, j) is positive if row_ids[i] == column_ids[j]. Without ids the positive of row i is column i + row_offset.
//
// Softmax: rows[i]    = logsumexp_j z_ij - mean of z_ij over the positives of row i, 0 if it has none;
//          columns[j] = logsumexp_i z_ij - mean of z_ij over the positives of column j, 0 if it has none.
// Sigmoid: term_ij = softplus(-t z_ij), t = +1 on positives and -1 elsewhere; rows[i] and columns[j] are its sums.
//
// Backward takes the gradient of every value and writes those of x, y, log(scale) and bias. Logits are recomputed.
// Numerics: float32 products and sums inside a tile; sums across tiles that feed one scalar are in double.
// The work is cut by shape alone, so the bits of the result do not depend on the number of threads.
// Extra memory: two packed copies of the inputs forward, one backward, and O(R + C) statistics for each of at most 32
// row chunks (backward: one [256, E] block for each chunk).
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

enum class PairLoss : int { softmax = 0, sigmoid = 1 };

struct PairProblem {
  int64_t rows, columns, width;
  Matrix x, y;
  float scale;                // exp(log_scale)
  float bias;                 // sigmoid only
  const int64_t* row_ids;     // [rows] or null
  const int64_t* column_ids;  // [columns] or null, together with row_ids
  int64_t row_offset;         // used without ids
};

struct PairForward {
  PairProblem problem;
  float* row_values;     // [rows]
  float* column_values;  // [columns]
  float* row_lse;        // [rows], softmax only: logsumexp_j z_ij
  float* column_lse;     // [columns], softmax only
};

struct PairBackward {
  PairProblem problem;
  const float* row_lse;          // softmax only
  const float* column_lse;
  const float* row_gradient;     // [rows], gradient of the loss with respect to row_values
  const float* column_gradient;  // [columns]
  MutableMatrix dx;              // [rows, width], data may be null if not wanted
  MutableMatrix dy;              // [columns, width], data may be null
  double* dlog_scale;            // one number, never null
  double* dbias;                 // one number, sigmoid only, may be null
};

// Both throw std::invalid_argument on negative sizes and std::bad_alloc without memory. threads >= 1.
void pair_forward(PairLoss loss, const PairForward& call, int threads);
void pair_backward(PairLoss loss, const PairBackward& call, int threads);

}  // namespace vlm
