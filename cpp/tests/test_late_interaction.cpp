// Late interaction against a float64 oracle that holds all token scores.
#include "check.hpp"
#include "late_oracle.hpp"
#include "vlm/late_interaction.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Side {
  int64_t samples, tokens, stride;
  std::vector<float> data;
  std::vector<uint8_t> mask;

  Side(Numbers& numbers, int64_t n, int64_t T, int64_t E, bool ragged) : samples(n), tokens(T), stride(E + 3) {
    data = numbers.normal(n * T * stride, 1.0f / std::sqrt(float(E)));
    mask.assign(n * T, 1);
    if (!ragged) return;
    for (int64_t i = 0; i < n; ++i) {
      const bool empty = numbers.below(9) == 0;
      for (int64_t t = 0; t < T; ++t) {
        if (!empty && numbers.below(3) > 0) continue;
        mask[i * T + t] = 0;
        for (int64_t e = 0; e < stride; ++e) data[(i * T + t) * stride + e] = NAN;
      }
    }
  }
  TokenSet set(bool ragged) const {
    return {data.data(), samples, tokens, tokens * stride, stride, ragged ? mask.data() : nullptr};
  }
};

struct Case {
  int64_t R, T, C, U, E;
  bool ragged, mean;
};

void compare(const Case& k) {
  const std::string name = "R" + std::to_string(k.R) + " T" + std::to_string(k.T) + " C" + std::to_string(k.C) + " U" +
                           std::to_string(k.U) + " E" + std::to_string(k.E) + (k.ragged ? " ragged" : "") +
                           (k.mean ? " mean" : " sum");
  Numbers numbers(7);
  const Side v(numbers, k.R, k.T, k.E, k.ragged), w(numbers, k.C, k.U, k.E, k.ragged);
  const std::vector<float> row_gradient = numbers.normal(k.R * k.C), column_gradient = numbers.normal(k.R * k.C);
  const LateProblem problem{v.set(k.ragged), w.set(k.ragged), k.E, k.mean};
  const LateAnswer o = late_oracle(problem, row_gradient.data(), column_gradient.data());
  std::vector<float> first[4];
  for (int threads : {1, 2, 5}) {
    std::vector<float> got[4] = {std::vector<float>(o.rows.size(), 9.0f), std::vector<float>(o.columns.size(), 9.0f),
                                 std::vector<float>(o.drows.size(), 9.0f),
                                 std::vector<float>(o.dcolumns.size(), 9.0f)};
    std::vector<uint16_t> found(k.R * k.C * (k.T + k.U));
    uint16_t* keep = threads == 2 && !found.empty() ? found.data() : nullptr;  // with or without: the same bits
    late_forward({problem, got[0].data(), got[1].data(), keep}, threads);
    late_backward({problem, row_gradient.data(), column_gradient.data(), keep, got[2].data(), got[3].data()}, threads);
    if (threads == 1) {
      check_close(got[0], o.rows, 3e-6, name + " rows");
      check_close(got[1], o.columns, 3e-6, name + " columns");
      check_close(got[2], o.drows, 1e-5, name + " dv");
      check_close(got[3], o.dcolumns, 1e-5, name + " dw");
    }
    for (int n = 0; n < 4; ++n) {
      if (threads == 1) first[n] = got[n];
      check(same_bits(first[n], got[n]), name + ": bits differ with " + std::to_string(threads) + " threads");
    }
  }
}

// Equal tokens: the first one gets the gradient, wherever the tiles are cut.
void first_of_equals_wins(int64_t T, int64_t U) {
  const std::vector<float> v(T, 1.0f), w(U, 1.0f), one(1, 1.0f);
  std::vector<float> dv(T), dw(U);
  const LateProblem problem{{v.data(), 1, T, T, 1, nullptr}, {w.data(), 1, U, U, 1, nullptr}, 1, false};
  late_backward({problem, one.data(), nullptr, nullptr, dv.data(), dw.data()}, 1);
  check(dw[0] == float(T), "all of the rows' gradient goes to the first column token");
  for (int64_t b = 1; b < U; ++b) check(dw[b] == 0.0f, "none goes to another");
  late_backward({problem, nullptr, one.data(), nullptr, dv.data(), dw.data()}, 1);
  check(dv[0] == float(U), "all of the columns' gradient goes to the first row token");
  for (int64_t a = 1; a < T; ++a) check(dv[a] == 0.0f, "none goes to another");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (bool ragged : {false, true}) {
      for (int64_t n : {1, 2, 7, 13, 33}) compare({n, 5, n, 3, 17, ragged, n % 2 == 0});
      compare({5, 1, 7, 1, 16, ragged, true});
      compare({3, 113, 4, 17, 24, ragged, true});
      compare({2, 250, 3, 520, 9, ragged, true});   // a column sample longer than a tile, a row sample of several
      compare({40, 16, 60, 15, 20, ragged, false});  // many samples in a tile
      compare({0, 4, 3, 4, 8, ragged, true});
      compare({3, 4, 0, 4, 8, ragged, true});
      compare({3, 0, 2, 4, 8, ragged, true});
      compare({3, 4, 2, 4, 1, ragged, true});
    }
    first_of_equals_wins(300, 600);
    first_of_equals_wins(3, 5);
  });
}
