// Entry of exact attention: checks, then calls the active level.
#include "vlm/attention.hpp"

#include <algorithm>
#include <stdexcept>

#include "attention/problem_checks.hpp"
#include "core/half_table.hpp"
#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(const AttentionProblem& p) {
  check_problem(p, "attention");
  if (p.half && p.temperature != nullptr)
    throw std::invalid_argument("attention: the cosine score is not computed in bfloat16");
  if (p.half && active_half_kernels() == nullptr)
    throw std::invalid_argument("attention: the level in force does not multiply bfloat16");
}

}  // namespace

void attention_forward(const AttentionForward& call, int threads) {
  check(call.problem);
  const auto run = call.problem.half ? active_half_kernels()->attention_forward : active_kernels().attention_forward;
  run(call, std::max(threads, 1));
}

void attention_backward(const AttentionBackward& call, int threads) {
  check(call.problem);
  const AttentionProblem& p = call.problem;
  if (call.dbias != nullptr && ((call.bias_batch != 1 && call.bias_batch != p.batch) ||
                                (call.bias_heads != 1 && call.bias_heads != p.query_heads) ||
                                (call.bias_rows != 1 && call.bias_rows != p.queries)))
    throw std::invalid_argument("attention: extents of the bias gradient do not fit");
  const auto run = p.half ? active_half_kernels()->attention_backward : active_kernels().attention_backward;
  run(call, std::max(threads, 1));
}

}  // namespace vlm
