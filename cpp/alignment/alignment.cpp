// Entry of sequence alignment: checks, then calls the active level.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check_lengths(const int64_t* lengths, int64_t batch, int64_t most) {
  for (int64_t b = 0; lengths != nullptr && b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > most)
      throw std::invalid_argument("alignment: a length lies outside of the matrix");
}

void check(const AlignmentProblem& p) {
  if (p.batch < 0 || p.rows < 0 || p.columns < 0) throw std::invalid_argument("alignment: negative size");
  if (!(p.gamma >= 0.0f && std::isfinite(p.gamma)))
    throw std::invalid_argument("alignment: gamma must be 0 or positive");
  check_lengths(p.row_lengths, p.batch, p.rows);
  check_lengths(p.column_lengths, p.batch, p.columns);
}

}  // namespace

void alignment_forward(const AlignmentForward& call, int threads) {
  check(call.problem);
  active_kernels().alignment_forward(call, std::max(threads, 1));
}

void alignment_backward(const AlignmentBackward& call, int threads) {
  check(call.problem);
  active_kernels().alignment_backward(call, std::max(threads, 1));
}

}  // namespace vlm
