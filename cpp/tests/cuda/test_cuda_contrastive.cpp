// The CUDA kernels of the contrastive losses against a float64 oracle that holds all pairs, in every order of
// execution.
#include "../contrastive_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors : PairInputs {
  std::vector<float> row_values, column_values, row_lse, column_lse, dx, dy;
  double dlog_scale = NAN, dbias = NAN;

  Tensors(int64_t R, int64_t C, int64_t E, bool groups, int64_t offset_)
      : PairInputs(R, C, E, groups, offset_),
        row_values(R, NAN),
        column_values(C, NAN),
        row_lse(R, NAN),
        column_lse(C, NAN),
        dx(R * E, NAN),
        dy(C * E, NAN) {}
  cuda::PairProblem problem() const {
    const PairProblem p = PairInputs::problem();
    return {rows, columns, width, p.x, p.y, scale, bias, p.row_ids, p.column_ids, offset};
  }
  cuda::PairForward forward() {
    return {problem(), row_values.data(), column_values.data(), row_lse.data(), column_lse.data()};
  }
  cuda::PairBackward backward(bool want_x, bool want_y) {
    return {problem(), row_lse.data(), column_lse.data(), row_gradient.data(), column_gradient.data(),
            {want_x ? dx.data() : nullptr, width}, {want_y ? dy.data() : nullptr, width}, &dlog_scale, &dbias};
  }
  void run(PairLoss loss, bool want_x = true, bool want_y = true) {
    std::vector<double> workspace(cuda::pair_workspace(problem()) / 8 + 1, NAN);
    cuda::pair_forward(loss, forward(), workspace.data(), nullptr);
    std::fill(workspace.begin(), workspace.end(), NAN);
    cuda::pair_backward(loss, backward(want_x, want_y), workspace.data(), nullptr);
  }
};

// Largest error over its limit; sums of signed terms are measured against the size of what was summed.
double error(const Tensors& t, const PairValues& o) {
  const double rows = error_between(t.row_values, o.rows);
  const double columns = error_between(t.column_values, o.columns);
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
  const PairValues o(loss, first);
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
      const PairValues o(loss, PairInputs(130, 130, 70, true, 0));
      every_barrier_is_needed(loss == PairLoss::softmax ? "softmax" : "sigmoid", [&] {
        Tensors t(130, 130, 70, true, 0);
        t.run(loss);
        return error(t, o) <= 1.0;
      });
    }
  });
}
