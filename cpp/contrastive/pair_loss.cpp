// Entry of the contrastive losses: checks, makes ids dense and counts positives, then calls the active level.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "core/half_table.hpp"

namespace vlm {
namespace {

constexpr int64_t padding = 16;  // the widest vector: kernels may load, never use, this many ids beyond the end

struct Targets {
  std::vector<int32_t> row_ids, column_ids, row_excluded, column_excluded;
  std::vector<float> row_count, column_count, positive_label, negative_label;
};

void count_diagonal(const PairProblem& p, Targets& t) {
  constexpr int64_t far = int64_t{1} << 32;  // beyond every row and column
  const int64_t offset = std::clamp(p.row_offset, -far, far);
  for (int64_t j = 0; j < p.columns; ++j) {
    t.column_ids[j] = static_cast<int32_t>(j);
    const int64_t i = j - offset;
    t.column_count[j] = i >= 0 && i < p.rows ? 1.0f : 0.0f;
  }
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t j = i + offset;
    const bool there = j >= 0 && j < p.columns;
    t.row_ids[i] = there ? static_cast<int32_t>(j) : -1;
    t.row_count[i] = there ? 1.0f : 0.0f;
  }
}

// Ids of both sides as small numbers: equal if and only if they were equal. -1: an id that no column has.
int64_t make_dense(const int64_t* rows, int64_t row_count, const int64_t* columns, int64_t column_count,
                   std::vector<int32_t>& dense_rows, std::vector<int32_t>& dense_columns) {
  std::vector<int64_t> known(columns, columns + column_count);
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  const auto dense = [&](int64_t id) {
    const auto at = std::lower_bound(known.begin(), known.end(), id);
    return at != known.end() && *at == id ? static_cast<int32_t>(at - known.begin()) : -1;
  };
  for (int64_t i = 0; i < row_count; ++i) dense_rows[i] = dense(rows[i]);
  for (int64_t j = 0; j < column_count; ++j) dense_columns[j] = dense(columns[j]);
  return static_cast<int64_t>(known.size());
}

void count_groups(const PairProblem& p, Targets& t) {
  const int64_t groups = make_dense(p.row_ids, p.rows, p.column_ids, p.columns, t.row_ids, t.column_ids);
  std::vector<float> in_rows(groups, 0.0f), in_columns(groups, 0.0f);
  for (int64_t i = 0; i < p.rows; ++i)
    if (t.row_ids[i] >= 0) ++in_rows[t.row_ids[i]];
  for (int64_t j = 0; j < p.columns; ++j) ++in_columns[t.column_ids[j]];
  for (int64_t i = 0; i < p.rows; ++i) t.row_count[i] = t.row_ids[i] < 0 ? 0.0f : in_columns[t.row_ids[i]];
  for (int64_t j = 0; j < p.columns; ++j) t.column_count[j] = in_rows[t.column_ids[j]];
}

Targets prepare(const PairProblem& p) {
  if (p.rows < 0 || p.columns < 0 || p.width < 0 || p.teacher.width < 0)
    throw std::invalid_argument("pair loss: negative size");
  if (p.rows > INT32_MAX || p.columns > INT32_MAX) throw std::invalid_argument("pair loss: over 2^31 rows or columns");
  if ((p.row_ids == nullptr) != (p.column_ids == nullptr) ||
      (p.row_excluded == nullptr) != (p.column_excluded == nullptr))
    throw std::invalid_argument("pair loss: ids must be given for rows and columns, or for neither");
  if ((p.positive_label == nullptr) != (p.negative_label == nullptr))
    throw std::invalid_argument("pair loss: labels must be given for positives and the others, or for neither");
  Targets t;
  t.row_ids.assign(p.rows + padding, -1);
  t.column_ids.assign(p.columns + padding, -2);
  t.row_excluded.assign(p.rows + padding, -1);
  t.column_excluded.assign(p.columns + padding, -2);
  t.row_count.assign(p.rows + padding, 0.0f);
  t.column_count.assign(p.columns + padding, 0.0f);
  if (p.row_ids == nullptr)
    count_diagonal(p, t);
  else
    count_groups(p, t);
  if (p.row_excluded != nullptr)
    make_dense(p.row_excluded, p.rows, p.column_excluded, p.columns, t.row_excluded, t.column_excluded);
  t.positive_label.assign(p.rows + padding, 1.0f);
  t.negative_label.assign(p.rows + padding, 0.0f);
  if (p.positive_label != nullptr) {
    std::copy(p.positive_label, p.positive_label + p.rows, t.positive_label.begin());
    std::copy(p.negative_label, p.negative_label + p.rows, t.negative_label.begin());
  }
  return t;
}

PairTargets view(const Targets& t, const PairProblem& p) {
  const bool plain = p.row_excluded == nullptr && !p.decoupled && !p.full && p.positive_label == nullptr &&
                     p.negative_weight == 1.0f && p.teacher.x.data == nullptr;
  return {t.row_ids.data(),         t.column_ids.data(),     t.row_excluded.data(),
          t.column_excluded.data(), t.row_count.data(),      t.column_count.data(),
          t.positive_label.data(),  t.negative_label.data(), plain};
}

}  // namespace

void pair_forward(PairLoss loss, const PairForward& call, int threads) {
  const Targets targets = prepare(call.problem);
  const bool softmax = loss == PairLoss::softmax;
  const KernelTable& kernels = active_kernels();
  const HalfKernels* half = call.problem.half ? active_half_kernels() : nullptr;
  auto run = softmax ? kernels.softmax_pair_forward : kernels.sigmoid_pair_forward;
  if (half != nullptr) run = softmax ? half->softmax_pair_forward : half->sigmoid_pair_forward;
  run(call, view(targets, call.problem), std::max(threads, 1));
}

void pair_backward(PairLoss loss, const PairBackward& call, int threads) {
  const Targets targets = prepare(call.problem);
  const bool softmax = loss == PairLoss::softmax;
  const KernelTable& kernels = active_kernels();
  const HalfKernels* half = call.problem.half ? active_half_kernels() : nullptr;
  auto run = softmax ? kernels.softmax_pair_backward : kernels.sigmoid_pair_backward;
  if (half != nullptr) run = softmax ? half->softmax_pair_backward : half->sigmoid_pair_backward;
  run(call, view(targets, call.problem), std::max(threads, 1));
}

}  // namespace vlm
