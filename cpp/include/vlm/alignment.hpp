// Order-preserving alignment of pairs of sequences from matrices of costs: DTW, soft-DTW and, in its logarithm, the
// global alignment kernel.
//
// B pairs, costs c [B, N, M]; pair b uses the first n_b rows and m_b columns. With R(0, 0) = 0 and
// R(i, 0) = R(0, j) = inf,
//   R(i, j) = c(i, j) + softmin_g {R(i-1, j-1), R(i-1, j), R(i, j-1)},   the value of a pair is R(n_b, m_b).
// softmin_g {x} = -g log sum exp(-x / g); for g = 0 it is the minimum, and the first of the three that attains it is
// taken.
// With costs -log k and g = 1, -R is the logarithm of the global alignment kernel of k.
// A pair of which one sequence is empty has the value inf, of which both are, 0. A cost of +inf forbids a cell.
//
// Backward: dR(n, m) / dc(i, j) times the pair's upstream gradient; 0 beyond the lengths and where the value is inf.
// Numerics: float32, one exponential less the minimum at every step, so nothing overflows.
// Costs beyond the lengths are never read into a result. Each vector lane holds one pair, cells go by anti-diagonals;
// the bits do not depend on the number of threads nor on the other pairs. Extra memory for each thread: W (vector
// width) pairs of costs and sums forward, and of their gradients backward, in which the sums are computed again.
#pragma once

#include <cstdint>

namespace vlm {

struct AlignmentProblem {
  int64_t batch, rows, columns;
  const float* cost;  // [batch, rows, columns], the last axis contiguous
  int64_t batch_stride, row_stride;
  const int64_t* row_lengths;     // [batch] or null for all
  const int64_t* column_lengths;  // [batch] or null for all
  float gamma;
};

struct AlignmentForward {
  AlignmentProblem problem;
  float* values;  // [batch]
};

struct AlignmentBackward {
  AlignmentProblem problem;
  const float* upstream;  // [batch]
  float* gradient;        // [batch, rows, columns], contiguous
};

// Both throw std::invalid_argument on negative sizes, lengths outside of the matrix or a gamma that is negative or not
// finite, and std::bad_alloc without memory.
void alignment_forward(const AlignmentForward& call, int threads);
void alignment_backward(const AlignmentBackward& call, int threads);

}  // namespace vlm
