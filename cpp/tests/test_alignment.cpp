// Sequence alignment against the plain recursion in float64, gradients by differences of it.
#include <algorithm>
#include <stdexcept>

#include "alignment_oracle.hpp"
#include "check.hpp"
#include "vlm/alignment.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Pairs {
  int64_t batch, rows, columns, row_stride, batch_stride;
  float gamma;
  std::vector<float> cost, upstream, values, gradient;
  std::vector<int64_t> n, m;

  Pairs(int64_t B, int64_t N, int64_t M, bool ragged, float gamma_)
      : batch(B), rows(N), columns(M), row_stride(M + 3), batch_stride(N * (M + 3) + 5), gamma(gamma_) {
    Numbers numbers(5);
    cost = numbers.normal(B * batch_stride);
    upstream = numbers.normal(B);
    values.resize(B);
    gradient.assign(B * N * M, NAN);
    for (int64_t b = 0; b < B; ++b) {
      n.push_back(ragged ? numbers.below(N + 1) : N);
      m.push_back(ragged ? numbers.below(M + 1) : M);
      for (int64_t i = 0; i < N; ++i)  // what lies beyond the lengths is never read into a result
        for (int64_t j = 0; j < row_stride; ++j)
          if (i >= n[b] || j >= m[b]) cost[b * batch_stride + i * row_stride + j] = NAN;
    }
  }
  void run(int threads) {
    const AlignmentProblem p{batch, rows, columns, cost.data(), batch_stride, row_stride, n.data(), m.data(), gamma};
    alignment_forward({p, values.data()}, threads);
    alignment_backward({p, upstream.data(), gradient.data()}, threads);
  }
};

void compare(int64_t B, int64_t N, int64_t M, bool ragged, float gamma) {
  const std::string name = "alignment B" + std::to_string(B) + " N" + std::to_string(N) + " M" + std::to_string(M) +
                           (ragged ? " ragged" : "") + " gamma" + std::to_string(gamma);
  Pairs pairs(B, N, M, ragged, gamma);
  pairs.run(1);
  std::vector<double> values(B), gradient(B * N * M, 0.0);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t n = pairs.n[b], m = pairs.m[b];
    std::vector<double> cost;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) cost.push_back(pairs.cost[b * pairs.batch_stride + i * pairs.row_stride + j]);
    values[b] = alignment_oracle(cost, n, m, gamma);
    for (std::size_t k = 0; k < cost.size(); ++k) {
      const double at = cost[k], step = 1e-6;
      cost[k] = at + step;
      const double above = alignment_oracle(cost, n, m, gamma);
      cost[k] = at - step;
      const double slope = (above - alignment_oracle(cost, n, m, gamma)) / (2 * step);
      gradient[(b * N + k / m) * M + k % m] = pairs.upstream[b] * slope;
      cost[k] = at;
    }
  }
  check_close(pairs.values, values, 1e-6, name + " values");
  check_close(pairs.gradient, gradient, gamma > 0.0f && gamma < 0.5f ? 5e-5 : 1e-5, name + " gradient");
  for (int threads : {2, 5}) {
    Pairs other(B, N, M, ragged, gamma);
    other.run(threads);
    check(same_bits(pairs.values, other.values) && same_bits(pairs.gradient, other.gradient),
          name + ": bits differ with threads");
  }
}

void a_forbidden_way_has_no_gradient() {
  std::vector<float> cost{1.0f, INFINITY, INFINITY, INFINITY}, value(1), gradient(4), upstream{2.0f};
  const AlignmentProblem p{1, 2, 2, cost.data(), 4, 2, nullptr, nullptr, 0.5f};
  alignment_forward({p, value.data()}, 1);
  alignment_backward({p, upstream.data(), gradient.data()}, 1);
  check(value[0] == INFINITY, "no way is left");
  for (float g : gradient) check(g == 0.0f, "and no gradient");
  cost[3] = 1.0f;  // only the diagonal is open
  alignment_forward({p, value.data()}, 1);
  alignment_backward({p, upstream.data(), gradient.data()}, 1);
  check(std::fabs(value[0] - 2.0f) < 1e-6f && gradient[0] == 2.0f && gradient[1] == 0.0f && gradient[3] == 2.0f,
        "one way");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (float gamma : {0.0f, 0.1f, 1.0f, 3.0f}) {
      for (int64_t B : {1, 3, 4, 5, 8, 15, 16, 17, 33}) compare(B, 5, 7, true, gamma);
      compare(2, 1, 1, false, gamma);
      compare(3, 1, 9, false, gamma);
      compare(3, 17, 1, false, gamma);
      compare(2, 19, 23, false, gamma);
      compare(0, 3, 3, false, gamma);
      compare(3, 0, 4, false, gamma);
    }
    a_forbidden_way_has_no_gradient();
    std::vector<int64_t> lengths{4};
    float value = 0.0f;
    bool refused = false;
    try {
      alignment_forward({{1, 3, 3, &value, 9, 3, lengths.data(), nullptr, 1.0f}, &value}, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "a length beyond the matrix");
  });
}
