// Contrastive losses against a float64 oracle that holds all pairs.
#include "check.hpp"
#include "vlm/contrastive.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors {
  int64_t rows, columns, width, offset, stride;
  float scale, bias;
  std::vector<float> x, y, row_gradient, column_gradient;
  std::vector<int64_t> row_ids, column_ids;
  std::vector<float> row_values, column_values, row_lse, column_lse, dx, dy;
  double dlog_scale = 0.0, dbias = 0.0;

  Tensors(int64_t R, int64_t C, int64_t E, bool groups, int64_t offset_)
      : rows(R), columns(C), width(E), offset(offset_), stride(E + 5), scale(6.5f), bias(-2.5f) {
    Numbers numbers(11);
    x = numbers.normal(R * stride, 1.0f / std::sqrt(float(E)));
    y = numbers.normal(C * stride, 1.0f / std::sqrt(float(E)));
    row_gradient = numbers.normal(R);
    column_gradient = numbers.normal(C);
    if (groups) {
      for (int64_t i = 0; i < R; ++i) row_ids.push_back((numbers.below(R / 2 + 2) - 3) * (int64_t(1) << 40));
      for (int64_t j = 0; j < C; ++j) column_ids.push_back((numbers.below(R / 2 + 2) - 2) * (int64_t(1) << 40));
    }
    row_values.resize(R);
    row_lse.resize(R);
    column_values.resize(C);
    column_lse.resize(C);
    dx.resize(R * E);
    dy.resize(C * E);
  }
  bool positive(int64_t i, int64_t j) const {
    return row_ids.empty() ? j == i + offset : row_ids[i] == column_ids[j];
  }
  PairProblem problem() const {
    const bool groups = !row_ids.empty();
    return {rows, columns, width, {x.data(), stride}, {y.data(), stride}, scale, bias,
            groups ? row_ids.data() : nullptr, groups ? column_ids.data() : nullptr, offset};
  }
  void run(PairLoss loss, int threads) {
    pair_forward(loss, {problem(), row_values.data(), column_values.data(), row_lse.data(), column_lse.data()},
                 threads);
    pair_backward(loss, {problem(), row_lse.data(), column_lse.data(), row_gradient.data(), column_gradient.data(),
                         {dx.data(), width}, {dy.data(), width}, &dlog_scale, &dbias},
                  threads);
  }
};

struct Oracle {
  std::vector<double> row_values, column_values, dx, dy;
  double dlog_scale = 0.0, dbias = 0.0;
};

Oracle oracle(const Tensors& t, PairLoss loss) {
  const int64_t R = t.rows, C = t.columns, E = t.width;
  Oracle o;
  o.row_values.assign(R, 0.0);
  o.column_values.assign(C, 0.0);
  o.dx.assign(R * E, 0.0);
  o.dy.assign(C * E, 0.0);
  std::vector<double> product(R * C), G(R * C, 0.0);
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j) {
      double dot = 0.0;
      for (int64_t e = 0; e < E; ++e) dot += double(t.x[i * t.stride + e]) * t.y[j * t.stride + e];
      product[i * C + j] = dot * t.scale;
    }
  if (loss == PairLoss::softmax) {
    const auto side = [&](bool by_rows) {
      const int64_t n = by_rows ? R : C, m = by_rows ? C : R;
      for (int64_t a = 0; a < n; ++a) {
        const auto at = [&](int64_t b) { return by_rows ? a * C + b : b * C + a; };
        const auto match = [&](int64_t b) { return by_rows ? t.positive(a, b) : t.positive(b, a); };
        double sum = 0.0, positives = 0.0;
        int64_t count = 0;
        for (int64_t b = 0; b < m; ++b) {
          sum += std::exp(product[at(b)]);
          if (match(b)) {
            positives += product[at(b)];
            ++count;
          }
        }
        if (count == 0) continue;
        (by_rows ? o.row_values : o.column_values)[a] = std::log(sum) - positives / count;
        const double g = by_rows ? t.row_gradient[a] : t.column_gradient[a];
        for (int64_t b = 0; b < m; ++b)
          G[at(b)] += g * (std::exp(product[at(b)]) / sum - (match(b) ? 1.0 / count : 0.0));
      }
    };
    side(true);
    side(false);
  } else {
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < C; ++j) {
        const double sign = t.positive(i, j) ? 1.0 : -1.0, z = product[i * C + j] + t.bias;
        const double term = std::log1p(std::exp(-sign * z));
        o.row_values[i] += term;
        o.column_values[j] += term;
        G[i * C + j] = -sign / (1.0 + std::exp(sign * z)) * (double(t.row_gradient[i]) + t.column_gradient[j]);
      }
  }
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j) {
      const double g = G[i * C + j];
      o.dlog_scale += g * product[i * C + j];
      if (loss == PairLoss::sigmoid) o.dbias += g;
      for (int64_t e = 0; e < E; ++e) {
        o.dx[i * E + e] += g * t.scale * t.y[j * t.stride + e];
        o.dy[j * E + e] += g * t.scale * t.x[i * t.stride + e];
      }
    }
  return o;
}

void compare(PairLoss loss, int64_t R, int64_t C, int64_t E, bool groups, int64_t offset) {
  const std::string name = std::string(loss == PairLoss::softmax ? "softmax" : "sigmoid") + " R" + std::to_string(R) +
                           " C" + std::to_string(C) + " E" + std::to_string(E) + (groups ? " groups" : " diagonal") +
                           " offset" + std::to_string(offset);
  Tensors t(R, C, E, groups, offset);
  t.run(loss, 1);
  const Oracle o = oracle(t, loss);
  check_close(t.row_values, o.row_values, 2e-6, name + " rows");
  check_close(t.column_values, o.column_values, 2e-6, name + " columns");
  check_close(t.dx, o.dx, 5e-6, name + " dx");
  check_close(t.dy, o.dy, 5e-6, name + " dy");
  // Sums of signed terms: measured against the size of what was summed.
  const double size = 1.0 + double(R + C);
  check(std::fabs(t.dlog_scale - o.dlog_scale) <= 2e-6 * size, name + " dlog_scale");
  if (loss == PairLoss::sigmoid) check(std::fabs(t.dbias - o.dbias) <= 2e-6 * size, name + " dbias");
  for (int threads : {2, 5}) {
    Tensors other(R, C, E, groups, offset);
    other.run(loss, threads);
    check(same_bits(t.row_values, other.row_values) && same_bits(t.column_values, other.column_values) &&
              same_bits(t.dx, other.dx) && same_bits(t.dy, other.dy) && t.dlog_scale == other.dlog_scale &&
              t.dbias == other.dbias,
          name + ": bits differ with " + std::to_string(threads) + " threads");
  }
}

void one_gradient_can_be_left_out() {
  Tensors all(70, 90, 20, false, 0), some(70, 90, 20, false, 0);
  all.run(PairLoss::softmax, 1);
  pair_forward(PairLoss::softmax, {some.problem(), some.row_values.data(), some.column_values.data(),
                                   some.row_lse.data(), some.column_lse.data()}, 1);
  pair_backward(PairLoss::softmax,
                {some.problem(), some.row_lse.data(), some.column_lse.data(), some.row_gradient.data(),
                 some.column_gradient.data(), {nullptr, 0}, {some.dy.data(), some.width}, &some.dlog_scale, nullptr}, 1);
  check(same_bits(all.dy, some.dy) && all.dlog_scale == some.dlog_scale, "dy alone equals dy of both");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (PairLoss loss : {PairLoss::softmax, PairLoss::sigmoid}) {
      for (int64_t n : {1, 2, 13, 14, 15, 47, 48, 49, 63, 64, 65, 111, 113, 257})
        compare(loss, n, n, 19, n % 2 == 0, 0);
      compare(loss, 101, 301, 32, false, 150);
      compare(loss, 301, 101, 33, false, -100);
      compare(loss, 301, 101, 7, true, 0);
      compare(loss, 600, 530, 64, true, 0);
      compare(loss, 0, 5, 4, false, 0);
      compare(loss, 5, 0, 4, false, 0);
      compare(loss, 5, 5, 1, false, 0);
    }
    one_gradient_can_be_left_out();
  });
}
