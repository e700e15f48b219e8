// Entry of the contrastive losses: checks, makes ids dense and counts positives, then calls the active level.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

constexpr int64_t padding = 16;  // the widest vector: kernels may load, never use, this many ids beyond the end

struct Targets {
  std::vector<int32_t> row_ids, column_ids;
  std::vector<float> row_share, column_share;
};

void count_diagonal(const PairProblem& p, Targets& t) {
  for (int64_t j = 0; j < p.columns; ++j) {
    t.column_ids[j] = static_cast<int32_t>(j);
    const int64_t i = j - p.row_offset;
    t.column_share[j] = i >= 0 && i < p.rows ? 1.0f : 0.0f;
  }
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t j = i + p.row_offset;
    const bool there = j >= 0 && j < p.columns;
    t.row_ids[i] = there ? static_cast<int32_t>(j) : -1;
    t.row_share[i] = there ? 1.0f : 0.0f;
  }
}

void count_groups(const PairProblem& p, Targets& t) {
  std::vector<int64_t> known(p.column_ids, p.column_ids + p.columns);
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  const auto dense = [&](int64_t id) {  // -1: an id that no column has
    const auto at = std::lower_bound(known.begin(), known.end(), id);
    return at != known.end() && *at == id ? static_cast<int32_t>(at - known.begin()) : -1;
  };
  std::vector<int64_t> in_rows(known.size(), 0), in_columns(known.size(), 0);
  for (int64_t i = 0; i < p.rows; ++i) {
    t.row_ids[i] = dense(p.row_ids[i]);
    if (t.row_ids[i] >= 0) ++in_rows[t.row_ids[i]];
  }
  for (int64_t j = 0; j < p.columns; ++j) {
    t.column_ids[j] = dense(p.column_ids[j]);
    ++in_columns[t.column_ids[j]];
  }
  const auto share = [](int64_t count) { return count > 0 ? 1.0f / static_cast<float>(count) : 0.0f; };
  for (int64_t i = 0; i < p.rows; ++i) t.row_share[i] = t.row_ids[i] < 0 ? 0.0f : share(in_columns[t.row_ids[i]]);
  for (int64_t j = 0; j < p.columns; ++j) t.column_share[j] = share(in_rows[t.column_ids[j]]);
}

Targets prepare(const PairProblem& p) {
  if (p.rows < 0 || p.columns < 0 || p.width < 0) throw std::invalid_argument("pair loss: negative size");
  if (p.rows > INT32_MAX || p.columns > INT32_MAX) throw std::invalid_argument("pair loss: over 2^31 rows or columns");
  if ((p.row_ids == nullptr) != (p.column_ids == nullptr))
    throw std::invalid_argument("pair loss: ids must be given for rows and columns, or for neither");
  Targets t;
  t.row_ids.assign(p.rows + padding, -1);
  t.column_ids.assign(p.columns + padding, -2);
  t.row_share.assign(p.rows + padding, 0.0f);
  t.column_share.assign(p.columns + padding, 0.0f);
  if (p.row_ids == nullptr)
    count_diagonal(p, t);
  else
    count_groups(p, t);
  return t;
}

PairTargets view(const Targets& t) {
  return {t.row_ids.data(), t.column_ids.data(), t.row_share.data(), t.column_share.data()};
}

}  // namespace

void pair_forward(PairLoss loss, const PairForward& call, int threads) {
  const Targets targets = prepare(call.problem);
  const KernelTable& kernels = active_kernels();
  const auto run = loss == PairLoss::softmax ? kernels.softmax_pair_forward : kernels.sigmoid_pair_forward;
  run(call, view(targets), std::max(threads, 1));
}

void pair_backward(PairLoss loss, const PairBackward& call, int threads) {
  const Targets targets = prepare(call.problem);
  const KernelTable& kernels = active_kernels();
  const auto run = loss == PairLoss::softmax ? kernels.softmax_pair_backward : kernels.sigmoid_pair_backward;
  run(call, view(targets), std::max(threads, 1));
}

}  // namespace vlm
