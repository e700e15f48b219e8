// Contrastive losses against a float64 oracle that holds all pairs.
#include <algorithm>

#include "contrastive_oracle.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors : PairInputs {
  bool full = false;  // take the unit for full targets
  std::vector<float> row_values, column_values, rows_out, columns_out, dx, dy;
  double dlog_scale = 0.0, dbias = 0.0;

  Tensors(int64_t R, int64_t C, int64_t E, bool groups, int64_t offset_)
      : PairInputs(R, C, E, groups, offset_),
        row_values(R),
        column_values(C),
        rows_out(PAIR_NUMBERS * R),
        columns_out(PAIR_NUMBERS * C),
        dx(R * E),
        dy(C * E) {}
  PairProblem problem() const {
    PairProblem p = PairInputs::problem();
    p.full = full;
    return p;
  }
  void forward(PairLoss loss, int threads) {
    pair_forward(loss, {problem(), rows_out.data(), columns_out.data()}, threads);
    row_values = PairValues::values(loss, rows_out, rows);
    column_values = PairValues::values(loss, columns_out, columns);
  }
  void backward(PairLoss loss, float* dx_to, int threads) {
    const std::vector<float> up_rows = PairValues::upstream(loss, rows_out, row_gradient);
    const std::vector<float> up_columns = PairValues::upstream(loss, columns_out, column_gradient);
    pair_backward(loss, {problem(), rows_out.data(), columns_out.data(), up_rows.data(), up_columns.data(),
                         {dx_to, width}, {dy.data(), width}, &dlog_scale, &dbias},
                  threads);
  }
  void run(PairLoss loss, int threads) {
    forward(loss, threads);
    backward(loss, dx.data(), threads);
  }
};

void compare(PairLoss loss, int64_t R, int64_t C, int64_t E, bool groups, int64_t offset) {
  const std::string name = std::string(loss == PairLoss::softmax ? "softmax" : "sigmoid") + " R" + std::to_string(R) +
                           " C" + std::to_string(C) + " E" + std::to_string(E) + (groups ? " groups" : " diagonal") +
                           " offset" + std::to_string(offset);
  Tensors t(R, C, E, groups, offset);
  t.run(loss, 1);
  const PairValues o(loss, t);
  check_close(t.row_values, o.rows, 2e-6, name + " rows");
  check_close(t.column_values, o.columns, 2e-6, name + " columns");
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
  const std::vector<float> up_rows = PairValues::upstream(PairLoss::softmax, wide.rows_out, wide.row_gradient);
  const std::vector<float> up_columns = PairValues::upstream(PairLoss::softmax, wide.columns_out, wide.column_gradient);
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
