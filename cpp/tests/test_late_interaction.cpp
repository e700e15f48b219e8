// Late interaction against a float64 oracle that holds all token scores.
#include "check.hpp"
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
  int64_t count(int64_t i) const {
    int64_t n = 0;
    for (int64_t t = 0; t < tokens; ++t) n += mask[i * tokens + t];
    return n;
  }
  const float* token(int64_t i, int64_t t) const { return data.data() + (i * tokens + t) * stride; }
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
  std::vector<double> rows(k.R * k.C, 0.0), columns(k.R * k.C, 0.0), dv(k.R * k.T * k.E, 0.0), dw(k.C * k.U * k.E, 0.0);
  const auto pull = [&](int64_t i, int64_t a, int64_t j, int64_t b, double g) {
    for (int64_t e = 0; e < k.E; ++e) {
      dv[(i * k.T + a) * k.E + e] += g * w.token(j, b)[e];
      dw[(j * k.U + b) * k.E + e] += g * v.token(i, a)[e];
    }
  };
  for (int64_t i = 0; i < k.R; ++i)
    for (int64_t j = 0; j < k.C; ++j) {
      std::vector<double> score(k.T * k.U, -INFINITY);
      for (int64_t a = 0; a < k.T; ++a)
        for (int64_t b = 0; b < k.U; ++b) {
          if (!v.mask[i * k.T + a] || !w.mask[j * k.U + b]) continue;
          double dot = 0.0;
          for (int64_t e = 0; e < k.E; ++e) dot += double(v.token(i, a)[e]) * w.token(j, b)[e];
          score[a * k.U + b] = dot;
        }
      const int64_t n = v.count(i), m = w.count(j), at = i * k.C + j;
      if (n == 0 || m == 0) continue;
      for (int64_t a = 0; a < k.T; ++a) {
        if (!v.mask[i * k.T + a]) continue;
        int64_t best = 0;
        for (int64_t b = 0; b < k.U; ++b)
          if (score[a * k.U + b] > score[a * k.U + best]) best = b;
        rows[at] += score[a * k.U + best] / (k.mean ? n : 1);
        pull(i, a, j, best, row_gradient[at] / (k.mean ? n : 1));
      }
      for (int64_t b = 0; b < k.U; ++b) {
        if (!w.mask[j * k.U + b]) continue;
        int64_t best = 0;
        for (int64_t a = 0; a < k.T; ++a)
          if (score[a * k.U + b] > score[best * k.U + b]) best = a;
        columns[at] += score[best * k.U + b] / (k.mean ? m : 1);
        pull(i, best, j, b, column_gradient[at] / (k.mean ? m : 1));
      }
    }
  const LateProblem problem{v.set(k.ragged), w.set(k.ragged), k.E, k.mean};
  std::vector<float> first[4];
  for (int threads : {1, 2, 5}) {
    std::vector<float> got[4] = {std::vector<float>(rows.size(), 9.0f), std::vector<float>(rows.size(), 9.0f),
                                 std::vector<float>(dv.size(), 9.0f), std::vector<float>(dw.size(), 9.0f)};
    std::vector<uint16_t> found(k.R * k.C * (k.T + k.U));
    uint16_t* keep = threads == 2 && !found.empty() ? found.data() : nullptr;  // with or without: the same bits
    late_forward({problem, got[0].data(), got[1].data(), keep}, threads);
    late_backward({problem, row_gradient.data(), column_gradient.data(), keep, got[2].data(), got[3].data()}, threads);
    if (threads == 1) {
      check_close(got[0], rows, 3e-6, name + " rows");
      check_close(got[1], columns, 3e-6, name + " columns");
      check_close(got[2], dv, 1e-5, name + " dv");
      check_close(got[3], dw, 1e-5, name + " dw");
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
