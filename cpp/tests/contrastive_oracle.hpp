// Contrastive losses in float64 from the definitions of vlm/contrastive.hpp, holding all pairs; and the values of the
// plain losses made of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.hpp"
#include "vlm/contrastive.hpp"

namespace vlm::test {

struct PairOracle {
  const PairProblem p;
  int64_t R, C;
  bool totals;               // numbers 2 and 5
  std::vector<double> z, u;  // logits and the teacher's, [R, C]
  std::vector<uint8_t> positive, kept;
  std::vector<double> rows, columns;  // [7, ...], sigmoid [1, ...]
  std::vector<double> dx, dy, dx_terms, dy_terms;  // terms: sums of the sizes of what is summed
  double dlog_scale = 0.0, dbias = 0.0, size = 0.0;  // size: of what was summed for the scalars
  bool borderline = false;  // a teacher's logit too near to `similar` to say which side float32 puts it

  PairOracle(PairLoss loss, const PairProblem& problem) : p(problem), R(p.rows), C(p.columns) {
    totals = p.full || p.decoupled || p.row_excluded != nullptr || p.teacher.x.data != nullptr;
    const int64_t offset = std::clamp<int64_t>(p.row_offset, -(R + C), R + C);  // those beyond meet nothing either
    z.resize(R * C), u.resize(R * C), positive.resize(R * C), kept.resize(R * C);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < C; ++j) {
        const int64_t at = i * C + j;
        z[at] = p.scale * dot(p.x, p.y, i, j, p.width) + (loss == PairLoss::sigmoid ? p.bias : 0.0f);
        positive[at] = p.row_ids == nullptr ? j - offset == i : p.row_ids[i] == p.column_ids[j];
        bool excluded = p.row_excluded != nullptr && p.row_excluded[i] == p.column_excluded[j];
        if (p.teacher.x.data != nullptr) {
          u[at] = p.teacher.scale * dot(p.teacher.x, p.teacher.y, i, j, p.teacher.width) + p.teacher.bias;
          excluded = excluded || u[at] > p.teacher.similar;
          borderline = borderline || std::fabs(u[at] - p.teacher.similar) < 1e-4;
        }
        kept[at] = positive[at] || !excluded;
      }
    rows = numbers(loss, true);
    columns = numbers(loss, false);
  }

  // Gradients from those of the numbers; column_gradient may be null.
  void backward(PairLoss loss, const float* row_gradient, const float* column_gradient) {
    dx.assign(R * p.width, 0.0), dy.assign(C * p.width, 0.0);
    dx_terms = dx, dy_terms = dy;
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < C; ++j) {
        const int64_t at = i * C + j;
        if (!kept[at]) continue;
        double g = 0.0;
        if (loss == PairLoss::sigmoid) {
          const double upstream = row_gradient[i] + (column_gradient == nullptr ? 0.0 : column_gradient[j]);
          g = upstream * (positive[at] ? 1.0 : p.negative_weight) * (1.0 / (1.0 + std::exp(-z[at])) - label(i, at));
        } else {
          g = softmax_gradient(rows, row_gradient, R, i, at);
          if (column_gradient != nullptr) g += softmax_gradient(columns, column_gradient, C, j, at);
        }
        const double product = z[at] - (loss == PairLoss::sigmoid ? p.bias : 0.0f);
        dlog_scale += g * product;
        dbias += g;
        size += std::fabs(g) * std::fmax(1.0, std::fabs(product));
        for (int64_t e = 0; e < p.width; ++e) {
          const double of_x = g * p.scale * p.y.data[j * p.y.row_stride + e];
          const double of_y = g * p.scale * p.x.data[i * p.x.row_stride + e];
          dx[i * p.width + e] += of_x, dx_terms[i * p.width + e] += std::fabs(of_x);
          dy[j * p.width + e] += of_y, dy_terms[j * p.width + e] += std::fabs(of_y);
        }
      }
  }

 private:
  static double dot(const Matrix& x, const Matrix& y, int64_t i, int64_t j, int64_t width) {
    double sum = 0.0;
    for (int64_t e = 0; e < width; ++e) sum += double(x.data[i * x.row_stride + e]) * y.data[j * y.row_stride + e];
    return sum;
  }
  double label(int64_t i, int64_t at) const {
    double hard = positive[at] ? 1.0 : 0.0;
    if (p.positive_label != nullptr) hard = positive[at] ? p.positive_label[i] : p.negative_label[i];
    if (p.teacher.x.data == nullptr) return hard;
    return (1.0 - p.teacher.share) * hard + p.teacher.share / (1.0 + std::exp(-u[at]));
  }
  double softmax_gradient(const std::vector<double>& of, const float* g, int64_t n, int64_t a, int64_t at) const {
    double sum = p.decoupled && positive[at] ? 0.0 : g[a] * std::exp(z[at] - of[a]);
    if (positive[at]) sum += g[n + a];
    if (totals) sum += g[2 * n + a];
    if (p.teacher.x.data != nullptr) sum += g[3 * n + a] * std::exp(u[at] - of[6 * n + a]);
    return sum;
  }
  std::vector<double> numbers(PairLoss loss, bool by_rows) const {
    const int64_t n = by_rows ? R : C, m = by_rows ? C : R;
    const auto place = [&](int64_t a, int64_t b) { return by_rows ? a * C + b : b * C + a; };
    std::vector<double> of((loss == PairLoss::sigmoid ? 1 : PAIR_NUMBERS) * n, 0.0);
    for (int64_t a = 0; a < n; ++a) {
      double sum = 0.0, teacher = 0.0, mean = 0.0;
      for (int64_t b = 0; b < m; ++b) {
        const int64_t at = place(a, b);
        if (!kept[at]) continue;
        if (loss == PairLoss::sigmoid) {
          const double term =
              std::fmax(z[at], 0.0) - label(by_rows ? a : b, at) * z[at] + std::log1p(std::exp(-std::fabs(z[at])));
          of[a] += (positive[at] ? 1.0 : p.negative_weight) * term;
          continue;
        }
        if (!(p.decoupled && positive[at])) sum += std::exp(z[at]);
        if (positive[at]) of[n + a] += z[at], of[4 * n + a] += 1.0;
        if (totals) of[2 * n + a] += z[at], of[5 * n + a] += 1.0;
        if (p.teacher.x.data != nullptr) teacher += std::exp(u[at]), mean += std::exp(u[at]) * z[at];
      }
      if (loss == PairLoss::sigmoid) continue;
      of[a] = std::log(sum);
      if (p.teacher.x.data != nullptr)
        of[3 * n + a] = teacher > 0.0 ? mean / teacher : 0.0, of[6 * n + a] = std::log(teacher);
    }
    return of;
  }
};

// Inputs of a plain loss, with a gap after each row.
struct PairInputs {
  int64_t rows, columns, width, offset, stride;
  float scale = 6.5f, bias = -2.5f;
  std::vector<float> x, y, row_gradient, column_gradient;
  std::vector<int64_t> row_ids, column_ids;

  PairInputs(int64_t R, int64_t C, int64_t E, bool groups, int64_t offset_)
      : rows(R), columns(C), width(E), offset(offset_), stride(E + 5) {
    Numbers numbers(11);
    x = numbers.normal(R * stride, 1.0f / std::sqrt(float(E + 1)));
    y = numbers.normal(C * stride, 1.0f / std::sqrt(float(E + 1)));
    row_gradient = numbers.normal(R);
    column_gradient = numbers.normal(C);
    for (int64_t i = 0; groups && i < R; ++i) row_ids.push_back((numbers.below(R / 2 + 2) - 3) * (int64_t(1) << 40));
    for (int64_t j = 0; groups && j < C; ++j) column_ids.push_back((numbers.below(R / 2 + 2) - 2) * (int64_t(1) << 40));
  }
  PairProblem problem() const {
    PairProblem p{};
    p.rows = rows;
    p.columns = columns;
    p.width = width;
    p.x = {x.data(), stride};
    p.y = {y.data(), stride};
    p.scale = scale;
    p.bias = bias;
    p.row_ids = row_ids.empty() ? nullptr : row_ids.data();
    p.column_ids = row_ids.empty() ? nullptr : column_ids.data();
    p.row_offset = offset;
    p.negative_weight = 1.0f;
    p.teacher.similar = INFINITY;
    return p;
  }
};

// The plain losses: rows[i] = logsumexp_j z_ij - mean of z_ij over the positives of row i, 0 if it has none (sigmoid:
// the sum of its terms), columns likewise, and the gradients of sum row_gradient rows + sum column_gradient columns.
struct PairValues {
  std::vector<double> rows, columns, dx, dy;
  double dlog_scale, dbias;

  PairValues(PairLoss loss, const PairInputs& in) {
    PairOracle all(loss, in.problem());
    rows = values(loss, all.rows, in.rows);
    columns = values(loss, all.columns, in.columns);
    const std::vector<float> up_rows = upstream(loss, all.rows, in.row_gradient);
    const std::vector<float> up_columns = upstream(loss, all.columns, in.column_gradient);
    all.backward(loss, up_rows.data(), up_columns.data());
    dx = all.dx, dy = all.dy, dlog_scale = all.dlog_scale, dbias = all.dbias;
  }

  // Values of numbers [7, n] (sigmoid [1, n]).
  template <class T>
  static std::vector<T> values(PairLoss loss, const std::vector<T>& numbers, int64_t n) {
    if (loss == PairLoss::sigmoid) return {numbers.begin(), numbers.begin() + n};
    std::vector<T> result(n, T(0));
    for (int64_t i = 0; i < n; ++i)
      if (numbers[4 * n + i] > 0) result[i] = numbers[i] - numbers[n + i] / numbers[4 * n + i];
    return result;
  }
  // The gradients of the numbers [4, n] (sigmoid [1, n]) from those of the values.
  template <class T>
  static std::vector<float> upstream(PairLoss loss, const std::vector<T>& numbers, const std::vector<float>& gradient) {
    const std::size_t n = gradient.size();
    if (loss == PairLoss::sigmoid) return gradient;
    std::vector<float> result(PAIR_GRADIENTS * n, 0.0f);
    for (std::size_t i = 0; i < n; ++i) {
      const float count = float(numbers[4 * n + i]);
      result[i] = count > 0.0f ? gradient[i] : 0.0f;
      result[n + i] = count > 0.0f ? -gradient[i] / count : 0.0f;
    }
    return result;
  }
};

}  // namespace vlm::test
