// Late interaction in float64 from the definitions of vlm/late_interaction.hpp, holding the token scores of one pair.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vlm/late_interaction.hpp"

namespace vlm::test {

struct LateAnswer {
  std::vector<double> rows, columns, drows, dcolumns;
  double margin = INFINITY;  // least distance of a maximum from the next score: below it float32 may choose another
};

inline bool keeps(const TokenSet& set, int64_t i, int64_t t) {
  return set.mask == nullptr || set.mask[i * set.tokens + t] != 0;
}

// Gradients of null upstreams are zeros.
inline LateAnswer late_oracle(const LateProblem& p, const float* row_gradient, const float* column_gradient) {
  const TokenSet &v = p.rows, &w = p.columns;
  const int64_t R = v.samples, T = v.tokens, C = w.samples, U = w.tokens, E = p.width;
  LateAnswer o;
  o.rows.assign(R * C, 0.0), o.columns.assign(R * C, 0.0), o.drows.assign(R * T * E, 0.0);
  o.dcolumns.assign(C * U * E, 0.0);
  const auto token = [](const TokenSet& set, int64_t i, int64_t t) {
    return set.data + i * set.sample_stride + t * set.token_stride;
  };
  const auto count = [](const TokenSet& set, int64_t i) {
    int64_t n = 0;
    for (int64_t t = 0; t < set.tokens; ++t) n += keeps(set, i, t);
    return n;
  };
  std::vector<double> score(T * U);
  const auto pull = [&](int64_t i, int64_t a, int64_t j, int64_t b, double g) {
    for (int64_t e = 0; e < E; ++e) {
      o.drows[(i * T + a) * E + e] += g * token(w, j, b)[e];
      o.dcolumns[(j * U + b) * E + e] += g * token(v, i, a)[e];
    }
  };
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j) {
      const int64_t n = count(v, i), m = count(w, j), at = i * C + j;
      if (n == 0 || m == 0) continue;
      for (int64_t a = 0; a < T; ++a)
        for (int64_t b = 0; b < U; ++b) {
          score[a * U + b] = -INFINITY;
          if (!keeps(v, i, a) || !keeps(w, j, b)) continue;
          score[a * U + b] = 0.0;
          for (int64_t e = 0; e < E; ++e) score[a * U + b] += double(token(v, i, a)[e]) * token(w, j, b)[e];
        }
      const auto best = [&](int64_t first, int64_t step, int64_t length) {
        int64_t top = 0;
        for (int64_t x = 1; x < length; ++x)
          if (score[first + x * step] > score[first + top * step]) top = x;
        for (int64_t x = 0; x < length; ++x)
          if (x != top) o.margin = std::fmin(o.margin, score[first + top * step] - score[first + x * step]);
        return top;
      };
      for (int64_t a = 0; a < T; ++a) {
        if (!keeps(v, i, a)) continue;
        const int64_t b = best(a * U, 1, U);
        o.rows[at] += score[a * U + b] / (p.mean ? n : 1);
        if (row_gradient != nullptr) pull(i, a, j, b, row_gradient[at] / (p.mean ? n : 1));
      }
      for (int64_t b = 0; b < U; ++b) {
        if (!keeps(w, j, b)) continue;
        const int64_t a = best(b, U, T);
        o.columns[at] += score[a * U + b] / (p.mean ? m : 1);
        if (column_gradient != nullptr) pull(i, a, j, b, column_gradient[at] / (p.mean ? m : 1));
      }
    }
  return o;
}

}  // namespace vlm::test
