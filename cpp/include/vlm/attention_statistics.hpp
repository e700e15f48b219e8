// Statistics of a softmax attention matrix P that is never stored, and the merge of partial attention results.
//
// P_ij = exp(s_ij - lse_i) over the pairs that the problem allows, s_ij and masks as in vlm/attention.hpp, atoms, soft
// cap and biases included, the cosine score and dropout not; the values `v` of the problem are not read and its
// value_width should be 0. A removed pair has probability exactly 0 and a key that key_mask removes is never read into a
// sum. A row without an allowed key is a row of zeros.
//
//   column sums     sums_bhj = sum_i weights_bhi P_bhij. A query of weight 0 is not read into a sum either.
//   row statistics  lse_i (natural logarithm, -inf for an empty row), entropy_i = -sum_j P_ij log P_ij (0 for an empty
//                   row), best_i = the allowed key of the largest logit, the lowest index of equals (-1 for an empty
//                   row).
//   rows            P_ij for the chosen queries i, all keys j. A chosen row of -1 is a row of zeros.
//   merge           parts (O_p, L_p) over disjoint keys -> L = log sum_p exp(L_p), O = sum_p exp(L_p - L) O_p. A part
//                   with L_p = -inf is empty and its O_p is not read. Backward: w_p = exp(L_p - L), dO_p = w_p dO,
//                   dL_p = w_p (dL + <dO, O_p - O>).
//
// An lse beyond 1024 has too few bits left for P: column sums then make the row's own again from the problem.
// Numerics: float32; column sums are added in three levels (14 or 6 rows, 16 such groups, all). Work is cut by shape
// alone, every output has one writer: bits do not depend on the number of threads.
// Memory of a thread: column sums hold one head's packed queries, row statistics one head's packed keys, rows one
// packed tile of keys.
#pragma once

#include <cstdint>

#include "vlm/attention.hpp"
#include "vlm/view.hpp"

namespace vlm {

struct AttentionColumnSums {
  AttentionProblem problem;
  const float* lse;      // [batch, query_heads, queries], contiguous
  const float* weights;  // the same extents, contiguous; null = all 1
  float* sums;           // [batch, query_heads, keys], contiguous
};

struct AttentionRowStatistics {
  AttentionProblem problem;
  float* lse;      // [batch, query_heads, queries], contiguous
  float* entropy;  // the same, or null if not wanted
  int64_t* best;   // the same, or null if not wanted
  float* top = nullptr;      // as in AttentionForward
  float* log_sum = nullptr;
};

struct AttentionRows {
  AttentionProblem problem;
  int64_t count;        // chosen queries of each sequence
  const int64_t* rows;  // [batch, count], in -1 .. queries - 1, contiguous
  float* probabilities; // [batch, query_heads, count, keys], contiguous
};

struct AttentionMerge {
  int64_t batch, heads, length, width, parts;
  const Heads* outs;         // [parts] of [batch, heads, length, width]
  const float* const* lses;  // [parts] of [batch, heads, length], contiguous
  MutableHeads out;
  float* lse;
};

struct AttentionMergeBackward {
  int64_t batch, heads, length, width, parts;
  const Heads* outs;
  const float* const* lses;
  Heads out;
  const float* lse;
  Heads dout;
  const float* dlse;
  const MutableHeads* douts;  // [parts]
  float* const* dlses;        // [parts], contiguous
};

// All throw std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void attention_column_sums(const AttentionColumnSums& call, int threads);
void attention_row_statistics(const AttentionRowStatistics& call, int threads);
void attention_rows(const AttentionRows& call, int threads);
void attention_merge(const AttentionMerge& call, int threads);
void attention_merge_backward(const AttentionMergeBackward& call, int threads);

}  // namespace vlm
