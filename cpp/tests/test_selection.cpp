// Selection and block-sparse attention: all keys equal dense attention in double; a planted block is found.
#include <stdexcept>

#include "check.hpp"
#include "vlm/selection.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t H = 4, G = 2, N, M, D = 12, V = 9, block_q, block_k, capacity;
  std::vector<float> q, k, v, out, lse;
  std::vector<int32_t> indices, counts;
  std::vector<int64_t> scored;

  Case(int64_t n, int64_t m, int64_t bq, int64_t bk)
      : N(n), M(m), block_q(bq), block_k(bk), capacity((m + bk - 1) / bk + 1) {
    Numbers numbers(7);
    q = numbers.normal(H * N * D);
    k = numbers.normal(G * M * D);
    v = numbers.normal(G * M * V);
    out.resize(H * N * V);
    lse.resize(H * N);
    const int64_t lists = H * ((N + bq - 1) / bq);
    indices.resize(lists * capacity);
    counts.resize(lists);
    scored.resize(lists);
  }
  SelectionProblem problem() const {
    return {1, H, G, N, M, D, {q.data(), 0, N * D, D}, {k.data(), 0, M * D, D}, M - N, block_q, block_k};
  }
  void select(int64_t budget, int64_t window, int threads) {
    select_hierarchical({problem(), budget, window, 0, 1, capacity, Representative::center, indices.data(),
                         counts.data(),
                         scored.data()},
                        threads);
  }
  void attend(int threads) {
    block_sparse_forward({problem(), {v.data(), 0, M * V, V}, V, capacity, 0.3f, indices.data(), counts.data(),
                          {out.data(), 0, N * V, V}, lse.data()},
                         threads);
  }
};

void all_keys_are_dense_attention(int64_t n, int64_t m, int64_t bq, int64_t bk) {
  Case c(n, m, bq, bk), other = c;
  c.select(m, 0, 1);
  c.attend(1);
  other.select(m, 0, 3);
  other.attend(3);
  check(same_bits(c.out, other.out) && c.indices == other.indices, "threads");
  std::vector<double> want(c.H * n * c.V, 0.0);
  for (int64_t h = 0; h < c.H; ++h)
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      double* row = want.data() + (h * n + i) * c.V;
      for (int64_t j = 0; j < m && j <= i + m - n; ++j) {
        double dot = 0.0;
        for (int64_t d = 0; d < c.D; ++d) dot += double(c.q[(h * n + i) * c.D + d]) * c.k[(h / 2 * m + j) * c.D + d];
        const double weight = std::exp(0.3f * dot);
        sum += weight;
        for (int64_t e = 0; e < c.V; ++e) row[e] += weight * c.v[(h / 2 * m + j) * c.V + e];
      }
      for (int64_t e = 0; e < c.V; ++e) row[e] = sum > 0.0 ? row[e] / sum : 0.0;
    }
  check_close(c.out, want, 3e-6, "dense N" + std::to_string(n) + " M" + std::to_string(m));
}

void a_planted_block_is_found() {
  Case c(1, 1024, 1, 4);
  for (float& x : c.q) x = 1.0f;
  for (int64_t j = 0; j < 2 * c.M; ++j)  // keys near place 700 are alike and fit the query
    for (int64_t d = 0; d < c.D; ++d) c.k[j * c.D + d] = 1.0f / (1.0f + std::fabs(float(j % c.M) - 700.0f));
  c.select(8, 0, 1);
  for (int64_t h = 0; h < c.H; ++h) {
    bool found = false;
    check(c.counts[h] == 8, "as many as the budget");
    for (int64_t i = 0; i < 8; ++i) {
      found = found || c.indices[h * c.capacity + i] == 175;
      check(i == 0 || c.indices[h * c.capacity + i] > c.indices[h * c.capacity + i - 1], "ascending");
    }
    check(found, "the best block is among them");
    check(c.scored[h] > 0 && c.scored[h] <= 16 * 6, "few representatives are scored");
  }
}

void refused() {
  Case c(4, 8, 4, 2);
  c.select(8, 0, 1);
  c.indices[0] = 99;
  try {
    c.attend(1);
    check(false, "a block outside is refused");
  } catch (const std::invalid_argument&) {
  }
}

// Numbers at the ends of int64 mean "all" and "nothing".
void far_numbers() {
  Case c(9, 40, 4, 4), near = c;
  c.select(INT64_MAX, INT64_MAX, 1);
  near.select(10, 0, 1);
  check(c.indices == near.indices && c.counts == near.counts, "every block that is seen");
  SelectionProblem p = c.problem();
  p.offset = INT64_MIN;
  select_hierarchical({p, 3, 0, INT64_MAX, INT64_MAX, c.capacity, Representative::first, c.indices.data(),
                       c.counts.data(), c.scored.data()}, 1);
  for (int32_t n : c.counts) check(n == 0, "nothing is seen");
  for (int value_width : {-1, 9}) {
    BlockSparseForward call{p, {}, value_width, value_width < 0 ? 1 : -1, 1.0f, nullptr, nullptr, {}, nullptr};
    try {
      block_sparse_forward(call, 1);
      check(false, "a negative size is refused");
    } catch (const std::invalid_argument&) {
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    all_keys_are_dense_attention(1, 1, 1, 1);
    all_keys_are_dense_attention(37, 37, 8, 2);
    all_keys_are_dense_attention(33, 300, 32, 16);
    all_keys_are_dense_attention(70, 30, 16, 3);
    all_keys_are_dense_attention(0, 9, 4, 4);
    a_planted_block_is_found();
    refused();
    far_numbers();
  });
}
