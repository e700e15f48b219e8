// Entry of late interaction: checks, lists the kept tokens, then calls the active level.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

struct Kept {
  std::vector<int64_t> first, source, position;
  int64_t longest = 0;
};

Kept list_kept(const TokenSet& set) {
  if (set.samples < 0 || set.tokens < 0) throw std::invalid_argument("late interaction: negative size");
  if (set.tokens > UINT16_MAX) throw std::invalid_argument("late interaction: over 65535 tokens in a sample");
  Kept kept;
  kept.first.reserve(set.samples + 1);
  for (int64_t i = 0; i < set.samples; ++i) {
    kept.first.push_back(static_cast<int64_t>(kept.source.size()));
    for (int64_t t = 0; t < set.tokens; ++t) {
      if (set.mask != nullptr && set.mask[i * set.tokens + t] == 0) continue;
      kept.source.push_back(i * set.sample_stride + t * set.token_stride);
      kept.position.push_back(i * set.tokens + t);
    }
    kept.longest = std::max(kept.longest, static_cast<int64_t>(kept.source.size()) - kept.first.back());
  }
  kept.first.push_back(static_cast<int64_t>(kept.source.size()));
  return kept;
}

TokenList view(const TokenSet& set, const Kept& kept) {
  return {set.data,          set.samples,         set.token_stride, kept.first.back(), kept.longest,
          kept.first.data(), kept.source.data(), kept.position.data()};
}

void check(const LateProblem& p) {
  if (p.width < 0) throw std::invalid_argument("late interaction: negative size");
}

}  // namespace

void late_forward(const LateForward& call, int threads) {
  check(call.problem);
  const Kept rows = list_kept(call.problem.rows), columns = list_kept(call.problem.columns);
  active_kernels().late_forward(call, view(call.problem.rows, rows), view(call.problem.columns, columns),
                                std::max(threads, 1));
}

void late_backward(const LateBackward& call, int threads) {
  check(call.problem);
  const Kept rows = list_kept(call.problem.rows), columns = list_kept(call.problem.columns);
  active_kernels().late_backward(call, view(call.problem.rows, rows), view(call.problem.columns, columns),
                                 std::max(threads, 1));
}

}  // namespace vlm
