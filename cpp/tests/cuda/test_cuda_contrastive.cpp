// The CUDA kernels of the contrastive losses against a float64 oracle that holds all pairs, in every order of
// execution.
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;
using cuda::PairLoss;

namespace {

struct Tensors {
  int64_t rows, columns, width, offset, stride;
  float scale = 6.5f, bias = -2.5f;
  std::vector<float> x, y, row_gradient, column_gradient;
  std::vector<int64_t> row_ids, column_ids;
  std::vector<float> row_values, column_values, row_lse, column_lse, dx, dy;
  double dlog_scale = NAN, dbias = NAN;

  Tensors(int64_t R, int64_t C, int64_t E, bool groups, int64_t offset_)
      : rows(R), columns(C), width(E), offset(offset_), stride(E + 5) {
    Numbers numbers(11);
    x = numbers.normal(R * stride, 1.0f / std::sqrt(float(E + 1)));
    y = numbers.normal(C * stride, 1.0f / std::sqrt(float(E + 1)));
    row_gradient = numbers.normal(R);
    column_gradient = numbers.normal(C);
    for (int64_t i = 0; groups && i < R; ++i) row_ids.push_back((numbers.below(R / 2 + 2) - 3) * (int64_t(1) << 40));
    for (int64_t j = 0; groups && j < C; ++j) column_ids.push_back((numbers.below(R / 2 + 2) - 2) * (int64_t(1) << 40));
    row_values.assign(R, NAN);
    row_lse.assign(R, NAN);
    column_values.assign(C, NAN);
    column_lse.assign(C, NAN);
    dx.assign(R * E, NAN);
    dy.assign(C * E, NAN);
  }
  cuda::PairProblem problem() const {
    const bool groups = !row_ids.empty();
    return {rows, columns, width, {x.data(), stride}, {y.data(), stride}, scale, bias,
            groups ? row_ids.data() : nullptr, groups ? column_ids.data() : nullptr, offset};
  }
  cuda::PairForward forward() {
    return {problem(), row_values.data(), column_values.data(), row_lse.data(), column_lse.data()};
  }
  cuda::PairBackward backward(bool want_x, bool want_y) {
    return {problem(), row_lse.data(), column_lse.data(), row_gradient.data(), column_gradient.data(),
            {want_x ? dx.data() : nullptr, width}, {want_y ? dy.data() : nullptr, width}, &dlog_scale, &dbias};
  }
  bool positive(int64_t i, int64_t j) const {
    return row_ids.empty() ? j == i + offset : row_ids[i] == column_ids[j];
  }
  void run(PairLoss loss, bool want_x = true, bool want_y = true) {
    std::vector<double> workspace(cuda::pair_workspace(problem()) / 8 + 1, NAN);
    cuda::pair_forward(loss, forward(), workspace.data(), nullptr);
    std::fill(workspace.begin(), workspace.end(), NAN);
    cuda::pair_backward(loss, backward(want_x, want_y), workspace.data(), nullptr);
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
  std::vector<double> z(R * C, 0.0), G(R * C, 0.0);
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j)
      for (int64_t e = 0; e < E; ++e) z[i * C + j] += t.scale * (double(t.x[i * t.stride + e]) * t.y[j * t.stride + e]);
  for (int64_t i = 0; i < R && loss == PairLoss::sigmoid; ++i)
    for (int64_t j = 0; j < C; ++j) {
      const double sign = t.positive(i, j) ? 1.0 : -1.0, logit = z[i * C + j] + t.bias;
      const double term = std::log1p(std::exp(-sign * logit));
      o.row_values[i] += term;
      o.column_values[j] += term;
      G[i * C + j] = -sign / (1.0 + std::exp(sign * logit)) * (double(t.row_gradient[i]) + t.column_gradient[j]);
    }
  for (bool by_rows : {true, false}) {
    if (loss == PairLoss::sigmoid) break;
    for (int64_t a = 0; a < (by_rows ? R : C); ++a) {
      const int64_t others = by_rows ? C : R;
      const auto at = [&](int64_t b) { return by_rows ? a * C + b : b * C + a; };
      const auto match = [&](int64_t b) { return by_rows ? t.positive(a, b) : t.positive(b, a); };
      double sum = 0.0, positives = 0.0, count = 0.0;
      for (int64_t b = 0; b < others; ++b) {
        sum += std::exp(z[at(b)]);
        positives += match(b) ? z[at(b)] : 0.0;
        count += match(b);
      }
      if (count == 0.0) continue;
      (by_rows ? o.row_values : o.column_values)[a] = std::log(sum) - positives / count;
      const double g = by_rows ? t.row_gradient[a] : t.column_gradient[a];
      for (int64_t b = 0; b < others; ++b) G[at(b)] += g * (std::exp(z[at(b)]) / sum - match(b) / count);
    }
  }
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j) {
      const double g = G[i * C + j];
      o.dlog_scale += g * z[i * C + j];
      o.dbias += g;
      for (int64_t e = 0; e < E; ++e) {
        o.dx[i * E + e] += g * t.scale * t.y[j * t.stride + e];
        o.dy[j * E + e] += g * t.scale * t.x[i * t.stride + e];
      }
    }
  return o;
}

// Largest error over its limit; sums of signed terms are measured against the size of what was summed.
double error(const Tensors& t, const Oracle& o) {
  const double rows = error_between(t.row_values, o.row_values);
  const double columns = error_between(t.column_values, o.column_values);
  double worst = std::fmax(rows, columns) / 2e-6;
  worst = std::fmax(worst, std::fmax(error_between(t.dx, o.dx), error_between(t.dy, o.dy)) / 5e-6);
  const double size = 1.0 + double(t.rows + t.columns);
  for (double difference : {t.dlog_scale - o.dlog_scale, t.dbias - o.dbias})
    worst = std::isnan(difference) ? INFINITY : std::fmax(worst, std::fabs(difference) / size / 2e-6);
  return worst;
}

bool same(const Tensors& a, const Tensors& b) {
  return same_bits(a.row_values, b.row_values) && same_bits(a.column_values, b.column_values) &&
         same_bits(a.dx, b.dx) && same_bits(a.dy, b.dy) && a.dlog_scale == b.dlog_scale && a.dbias == b.dbias;
}

void compare(PairLoss loss, int64_t R, int64_t C, int64_t E, bool groups, int64_t offset) {
  const std::string name = std::string(loss == PairLoss::softmax ? "softmax" : "sigmoid") + " R" + std::to_string(R) +
                           " C" + std::to_string(C) + " E" + std::to_string(E) + (groups ? " groups" : " diagonal") +
                           " offset" + std::to_string(offset);
  Tensors first(R, C, E, groups, offset);
  first.run(loss);
  const Oracle o = oracle(first, loss);
  in_every_mode([&](const std::string& mode) {
    Tensors t(R, C, E, groups, offset);
    t.run(loss);
    check(error(t, o) <= 1.0, name + " " + mode + ": error over its limit " + std::to_string(error(t, o)));
    check(same(t, first), name + " " + mode + ": bits depend on the order of execution");
  });
}

void gradients_can_be_left_out(PairLoss loss) {
  Tensors all(70, 90, 20, true, 0), neither(70, 90, 20, true, 0), y_only(70, 90, 20, true, 0);
  all.run(loss);
  neither.run(loss, false, false);
  y_only.run(loss, false, true);
  check(all.dlog_scale == neither.dlog_scale && all.dbias == neither.dbias && std::isnan(neither.dx[0]),
        "the gradient of the scale alone");
  check(same_bits(all.dy, y_only.dy) && all.dlog_scale == y_only.dlog_scale, "dy alone equals dy of both");
}

}  // namespace

int main() {
  return run_emulated([] {
    for (PairLoss loss : {PairLoss::softmax, PairLoss::sigmoid}) {
      for (int64_t n : {1, 63, 64, 65}) compare(loss, n, n, 19, n % 2 == 0, 0);
      compare(loss, 70, 150, 64, false, 75);
      compare(loss, 150, 70, 33, false, -60);
      compare(loss, 130, 67, 7, true, 0);
      compare(loss, 65, 20, 300, true, 0);
      compare(loss, 10, 66, 520, false, 3);
      compare(loss, 0, 5, 4, false, 0);
      compare(loss, 5, 0, 4, false, 0);
      compare(loss, 5, 6, 0, false, 0);
      gradients_can_be_left_out(loss);
      const Oracle o = oracle(Tensors(130, 130, 70, true, 0), loss);
      every_barrier_is_needed(loss == PairLoss::softmax ? "softmax" : "sigmoid", [&] {
        Tensors t(130, 130, 70, true, 0);
        t.run(loss);
        return error(t, o) <= 1.0;
      });
    }
  });
}
