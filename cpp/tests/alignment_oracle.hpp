// Alignment of two sequences in float64: the plain recursion of vlm/alignment.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace vlm::test {

inline double alignment_oracle(const std::vector<double>& cost, int64_t n, int64_t m, double gamma) {
  std::vector<double> R((n + 1) * (m + 1), INFINITY);
  R[0] = 0.0;
  const auto at = [&](int64_t i, int64_t j) -> double& { return R[i * (m + 1) + j]; };
  for (int64_t i = 1; i <= n; ++i)
    for (int64_t j = 1; j <= m; ++j) {
      const double a = at(i - 1, j - 1), b = at(i - 1, j), c = at(i, j - 1), low = std::min({a, b, c});
      double least = low;
      if (gamma > 0 && !std::isinf(low))
        least = low - gamma * std::log(std::exp((low - a) / gamma) + std::exp((low - b) / gamma) +
                                       std::exp((low - c) / gamma));
      at(i, j) = cost[(i - 1) * m + j - 1] + least;
    }
  return at(n, m);
}

}  // namespace vlm::test
