// Entry of attention statistics and of the merge: checks, then calls the active level.
#include "vlm/attention_statistics.hpp"

#include <algorithm>
#include <stdexcept>

#include "attention/problem_checks.hpp"
#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(const AttentionProblem& p) {
  check_problem(p, "attention statistics");
  if (p.temperature != nullptr || p.drop_below != 0)
    throw std::invalid_argument("attention statistics: neither cosine products nor dropout");
}

template <class Call>
void check_merge(const Call& c) {
  for (int64_t n : {c.batch, c.heads, c.length, c.width})
    if (n < 0) throw std::invalid_argument("attention merge: negative size");
  if (c.parts < 1) throw std::invalid_argument("attention merge: no parts");
}

}  // namespace

void attention_column_sums(const AttentionColumnSums& call, int threads) {
  check(call.problem);
  active_kernels().attention_column_sums(call, std::max(threads, 1));
}

void attention_row_statistics(const AttentionRowStatistics& call, int threads) {
  check(call.problem);
  active_kernels().attention_row_statistics(call, std::max(threads, 1));
}

void attention_rows(const AttentionRows& call, int threads) {
  check(call.problem);
  if (call.count < 0) throw std::invalid_argument("attention rows: negative count");
  for (int64_t at = 0; at < call.problem.batch * call.count; ++at)
    if (call.rows[at] < -1 || call.rows[at] >= call.problem.queries)
      throw std::invalid_argument("attention rows: a row lies outside of the queries");
  active_kernels().attention_rows(call, std::max(threads, 1));
}

void attention_merge(const AttentionMerge& call, int threads) {
  check_merge(call);
  active_kernels().attention_merge(call, std::max(threads, 1));
}

void attention_merge_backward(const AttentionMergeBackward& call, int threads) {
  check_merge(call);
  active_kernels().attention_merge_backward(call, std::max(threads, 1));
}

}  // namespace vlm
