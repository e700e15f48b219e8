// Rows of vocabulary losses in float64, from the definitions of vlm/vocabulary.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vlm/vocabulary.hpp"

namespace vlm::test {

struct CrossEntropyRow {
  double loss, log_p, lse;
  std::vector<double> gradient;
};

// Of row i of the call, whose chunk is `row` as it was given.
inline CrossEntropyRow cross_entropy_oracle(const CrossEntropyRows& call, const float* row, int64_t i) {
  const int64_t V = call.ids, y = call.labels[i];
  std::vector<double> z(V), slope(V, 1.0);
  double top = -INFINITY, sum = 0.0, all = 0.0;
  for (int64_t v = 0; v < V; ++v) {
    z[v] = row[v] + (call.bias == nullptr ? 0.0 : call.bias[v]);
    if (call.softcap > 0) {
      const double t = std::tanh(z[v] / call.softcap);
      z[v] = call.softcap * t;
      slope[v] = 1.0 - t * t;
    }
    top = std::fmax(top, z[v]);
    all += z[v];
  }
  for (int64_t v = 0; v < V; ++v) sum += top == -INFINITY ? 0.0 : std::exp(z[v] - top);
  const double L = top == -INFINITY ? top : top + std::log(sum), e = y < 0 ? 0.0 : call.smoothing;
  CrossEntropyRow o{L, 0.0, L, std::vector<double>(V, 0.0)};
  const double factor = call.factors == nullptr ? 1.0 : call.factors[i];
  if (top == -INFINITY) {  // no probability
    o.loss = INFINITY;
    o.log_p = y < 0 ? 0.0 : -INFINITY;
    return o;
  }
  if (y >= 0) {
    o.loss -= (1 - e) * z[y];
    o.log_p = z[y] - L;
  }
  if (e > 0) o.loss -= e / V * all;
  if (call.z_loss != 0) o.loss += call.z_loss * L * L;
  for (int64_t v = 0; v < V; ++v)
    o.gradient[v] =
        factor * slope[v] * (std::exp(z[v] - L) * (1 + 2 * call.z_loss * L) - (v == y ? 1 - e : 0.0) - e / V);
  return o;
}

inline double divergence_oracle(Divergence kind, const std::vector<double>& s, const std::vector<double>& t,
                                double temperature, double m) {
  const auto softmax = [&](const std::vector<double>& x) {
    std::vector<double> p(x.size(), 0.0);
    double sum = 0.0;
    for (std::size_t v = 0; v < x.size(); ++v)
      if (!std::isinf(s[v]) && !std::isinf(t[v])) sum += p[v] = std::exp(x[v] / temperature);
    for (double& value : p) value = sum > 0 ? value / sum : 0.0;
    return p;
  };
  const std::vector<double> p = softmax(s), q = softmax(t);
  double total = 0.0;
  for (std::size_t v = 0; v < p.size(); ++v) {
    if (p[v] == 0.0) continue;
    const double forward = q[v] * std::log(q[v] / p[v]), reverse = p[v] * std::log(p[v] / q[v]);
    const double mixed = (1 - m) * q[v] + m * p[v], skewed = m * q[v] + (1 - m) * p[v];
    switch (kind) {
      case Divergence::forward: total += forward; break;
      case Divergence::reverse: total += reverse; break;
      case Divergence::symmetric: total += (1 - m) * forward + m * reverse; break;
      case Divergence::js: total += (1 - m) * q[v] * std::log(q[v] / mixed) + m * p[v] * std::log(p[v] / mixed); break;
      case Divergence::skew: total += q[v] * std::log(q[v] / skewed); break;
      case Divergence::tv: total += 0.5 * std::fabs(p[v] - q[v]); break;
    }
  }
  return total;
}

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
