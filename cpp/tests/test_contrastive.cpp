// Contrastive losses against a float64 oracle that holds all pairs.
#include <algorithm>

#include "check.hpp"
#include "vlm/contrastive.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors {
  int64_t rows, columns, width, offset, stride;
  float scale, bias;
  bool full = false;  // take the unit for full targets
  std::vector<float> x, y, row_gradient, column_gradient;
  std::vector<int64_t> row_ids, column_ids;
  std::vector<float> row_values, column_values, rows_out, columns_out, dx, dy;
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
    column_values.resize(C);
    rows_out.resize(PAIR_NUMBERS * R);
    columns_out.resize(PAIR_NUMBERS * C);
    dx.resize(R * E);
    dy.resize(C * E);
  }
  bool positive(int64_t i, int64_t j) const {
    const int64_t near = std::clamp<int64_t>(offset, -10000, 10000);  // beyond all rows and columns
    return row_ids.empty() ? j == i + near : row_ids[i] == column_ids[j];
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
    p.full = full;
    p.negative_weight = 1.0f;
    p.teacher.similar = INFINITY;
    return p;
  }
  void forward(PairLoss loss, int threads) {
    pair_forward(loss, {problem(), rows_out.data(), columns_out.data()}, threads);
    const auto values = [&](const std::vector<float>& out, std::vector<float>& to) {
      const std::size_t n = to.size();
      for (std::size_t i = 0; i < n; ++i) {
        const float count = loss == PairLoss::softmax ? out[4 * n + i] : 0.0f;
        to[i] = loss == PairLoss::sigmoid ? out[i] : count > 0.0f ? out[i] - out[n + i] / count : 0.0f;
      }
    };
    values(rows_out, row_values);
    values(columns_out, column_values);
  }
  // The gradients of the numbers, from those of the values.
  std::vector<float> upstream(PairLoss loss, const std::vector<float>& out, const std::vector<float>& gradient) const {
    const std::size_t n = gradient.size();
    if (loss == PairLoss::sigmoid) return gradient;
    std::vector<float> result(PAIR_GRADIENTS * n, 0.0f);
    for (std::size_t i = 0; i < n; ++i) {
      const float count = out[4 * n + i];
      result[i] = count > 0.0f ? gradient[i] : 0.0f;
      result[n + i] = count > 0.0f ? -gradient[i] / count : 0.0f;
    }
    return result;
  }
  void backward(PairLoss loss, float* dx_to, int threads) {
    const std::vector<float> up_rows = upstream(loss, rows_out, row_gradient);
    const std::vector<float> up_columns = upstream(loss, columns_out, column_gradient);
    pair_backward(loss, {problem(), rows_out.data(), columns_out.data(), up_rows.data(), up_columns.data(),
                         {dx_to, width}, {dy.data(), width}, &dlog_scale, &dbias},
                  threads);
  }
  void run(PairLoss loss, int threads) {
    forward(loss, threads);
    backward(loss, dx.data(), threads);
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
  some.forward(PairLoss::softmax, 1);
  some.backward(PairLoss::softmax, nullptr, 1);
  check(same_bits(all.dy, some.dy) && all.dlog_scale == some.dlog_scale, "dy alone equals dy of both");
}

// The unit for full targets, with plain ones, gives what the plain unit gives.
void full_targets_hold_plain_ones(PairLoss loss, bool groups) {
  Tensors plain(150, 333, 24, groups, 20), full(150, 333, 24, groups, 20);
  full.full = true;
  plain.run(loss, 1);
  full.run(loss, 1);
  check_close(full.row_values, plain.row_values, 1e-6, "full rows");
  check_close(full.column_values, plain.column_values, 1e-6, "full columns");
  check_close(full.dx, plain.dx, 1e-6, "full dx");
  check_close(full.dy, plain.dy, 1e-6, "full dy");
  if (loss == PairLoss::sigmoid) return;
  for (int64_t i = 0; i < 150; ++i) check(full.rows_out[5 * 150 + i] == 333.0f, "every column is kept");
  for (int64_t j = 0; j < 333; ++j) check(full.columns_out[5 * 333 + j] == 150.0f, "every row is kept");
}

// bfloat16 rows give the bits of the same numbers in float32.
void half_input_is_read_as_it_lies() {
  Tensors wide(130, 300, 37, true, 0), narrow(130, 300, 37, true, 0);
  const auto cut = [](std::vector<float>& values, std::vector<uint16_t>& to) {
    for (float& v : values) {
      uint32_t bits;
      std::memcpy(&bits, &v, 4);
      bits &= 0xffff0000u;
      std::memcpy(&v, &bits, 4);
      to.push_back(static_cast<uint16_t>(bits >> 16));
    }
  };
  std::vector<uint16_t> x, y;
  cut(wide.x, x);
  cut(wide.y, y);
  wide.run(PairLoss::softmax, 1);
  PairProblem p = narrow.problem();
  p.half = true;
  p.x.data = reinterpret_cast<const float*>(x.data());
  p.y.data = reinterpret_cast<const float*>(y.data());
  pair_forward(PairLoss::softmax, {p, narrow.rows_out.data(), narrow.columns_out.data()}, 2);
  check(same_bits(wide.rows_out, narrow.rows_out) && same_bits(wide.columns_out, narrow.columns_out), "half forward");
  const std::vector<float> up_rows = wide.upstream(PairLoss::softmax, wide.rows_out, wide.row_gradient);
  const std::vector<float> up_columns = wide.upstream(PairLoss::softmax, wide.columns_out, wide.column_gradient);
  pair_backward(PairLoss::softmax,
                {p, narrow.rows_out.data(), narrow.columns_out.data(), up_rows.data(), up_columns.data(),
                 {narrow.dx.data(), 37}, {narrow.dy.data(), 37}, &narrow.dlog_scale, nullptr}, 2);
  check(same_bits(wide.dx, narrow.dx) && same_bits(wide.dy, narrow.dy) && wide.dlog_scale == narrow.dlog_scale,
        "half backward");
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
      for (int64_t far : {INT64_MAX, INT64_MIN}) compare(loss, 5, 7, 3, false, far);
    }
    one_gradient_can_be_left_out();
    for (bool groups : {false, true})
      for (PairLoss loss : {PairLoss::softmax, PairLoss::sigmoid}) full_targets_hold_plain_ones(loss, groups);
    half_input_is_read_as_it_lies();
  });
}
