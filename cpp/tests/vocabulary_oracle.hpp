// Cross-entropy over the vocabulary in float64, from the formulas of vlm/vocabulary.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace vlm::test {

struct CrossEntropyOptions {
  int64_t rows, ids;
  const float* bias;      // or null
  const int64_t* labels;
  const float* factors;   // or null
  float smoothing, z_loss, softcap;
};

struct CrossEntropyAnswer {
  std::vector<double> loss, log_p, lse;
  std::vector<double> gradient;  // [rows, ids], of the products
};

// product(i, v) as a double
template <class Product>
CrossEntropyAnswer cross_entropy_oracle(const CrossEntropyOptions& o, Product product) {
  const int64_t R = o.rows, V = o.ids;
  CrossEntropyAnswer a{std::vector<double>(R), std::vector<double>(R), std::vector<double>(R),
                       std::vector<double>(R * V)};
  for (int64_t i = 0; i < R; ++i) {
    std::vector<double> z(V), slope(V, 1.0);
    double sum = 0.0, all = 0.0;
    for (int64_t v = 0; v < V; ++v) {
      z[v] = product(i, v) + (o.bias == nullptr ? 0.0 : o.bias[v]);
      if (o.softcap > 0) {
        const double t = std::tanh(z[v] / o.softcap);
        z[v] = o.softcap * t;
        slope[v] = 1.0 - t * t;
      }
      sum += std::exp(z[v]);
      all += z[v];
    }
    const int64_t y = o.labels[i];
    const double L = std::log(sum), e = y < 0 ? 0.0 : o.smoothing, factor = o.factors == nullptr ? 1.0 : o.factors[i];
    a.lse[i] = L;
    a.log_p[i] = y < 0 ? 0.0 : z[y] - L;
    a.loss[i] = L - (y < 0 ? 0.0 : (1 - e) * z[y]) - e / V * all + o.z_loss * L * L;
    for (int64_t v = 0; v < V; ++v)
      a.gradient[i * V + v] =
          factor * slope[v] * (std::exp(z[v] - L) * (1 + 2 * o.z_loss * L) - (v == y ? 1 - e : 0.0) - e / V);
  }
  return a;
}

}  // namespace vlm::test
