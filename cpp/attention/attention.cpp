// Entry of exact attention: checks, then calls the active level.
#include "vlm/attention.hpp"

#include <algorithm>
#include <stdexcept>

#include "attention/problem_checks.hpp"
#include "core/kernel_table.hpp"

namespace vlm {
void attention_forward(const AttentionForward& call, int threads) {
  check_problem(call.problem, "attention");
  active_kernels().attention_forward(call, std::max(threads, 1));
}

void attention_backward(const AttentionBackward& call, int threads) {
  check_problem(call.problem, "attention");
  const AttentionProblem& p = call.problem;
  if (call.dbias != nullptr && ((call.bias_batch != 1 && call.bias_batch != p.batch) ||
                                (call.bias_heads != 1 && call.bias_heads != p.query_heads) ||
                                (call.bias_rows != 1 && call.bias_rows != p.queries)))
    throw std::invalid_argument("attention: extents of the bias gradient do not fit");
  active_kernels().attention_backward(call, std::max(threads, 1));
}

}  // namespace vlm
