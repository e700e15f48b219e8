// Token matching, moves and sums written from the definitions of vlm/tokens.hpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.hpp"
#include "vlm/tokens.hpp"

namespace vlm::test {

struct Matched {
  std::vector<int64_t> source, target, kept, assign;
  bool operator==(const Matched& o) const {
    return source == o.source && target == o.target && kept == o.kept && assign == o.assign;
  }
};

// metric [batch, heads, length, width] in [B, N, H, D] order with a gap after each row.
struct Metric {
  int64_t batch, heads, length, width, gap = 3;
  std::vector<float> values;
  Metric(int64_t b, int64_t h, int64_t n, int64_t d, uint64_t seed)
      : batch(b), heads(h), length(n), width(d), values(Numbers(seed).normal(b * n * h * (d + gap))) {}
  const float* row(int64_t b, int64_t h, int64_t n) const {
    return values.data() + ((b * length + n) * heads + h) * (width + gap);
  }
  // The call, with room for its results in `m`.
  TokenMatch call(int64_t merged, int64_t protect, MatchOrder order, Matched& m) const {
    m = {std::vector<int64_t>(batch * merged, -7), std::vector<int64_t>(batch * merged, -7),
         std::vector<int64_t>(batch * (length - merged), -7), std::vector<int64_t>(batch * length, -7)};
    const int64_t row = heads * (width + gap);
    return {batch, heads, length, width, values.data(), length * row, width + gap, row, merged, protect, order,
            m.source.data(), m.target.data(), m.kept.data(), m.assign.data()};
  }
  double cosine(int64_t b, int64_t x, int64_t y) const {
    double dot = 0, xx = 0, yy = 0;
    for (int64_t e = 0; e < width; ++e) {
      double u = 0, v = 0;
      for (int64_t h = 0; h < heads; ++h) {
        u += row(b, h, x)[e];
        v += row(b, h, y)[e];
      }
      dot += u * v;
      xx += u * u;
      yy += v * v;
    }
    return dot / std::sqrt(xx * yy);
  }
};

inline Matched by_hand(const Metric& t, int64_t merged, int64_t protect, MatchOrder order) {
  Matched m;
  for (int64_t b = 0; b < t.batch; ++b) {
    std::vector<std::pair<double, std::pair<int64_t, int64_t>>> pairs;  // -cosine, source, target
    for (int64_t a = (protect + 1) / 2 * 2; a < t.length; a += 2) {
      double best = -INFINITY;
      int64_t goal = protect / 2 * 2 + 1;
      for (int64_t g = goal; g < t.length; g += 2)
        if (t.cosine(b, a, g) > best) best = t.cosine(b, a, goal = g);
      pairs.push_back({-best, {a, goal}});
    }
    std::sort(pairs.begin(), pairs.end());
    std::vector<int64_t> kept, into(t.length, -1), place(t.length, -1);
    for (int64_t r = 0; r < merged; ++r) {
      m.source.push_back(pairs[r].second.first);
      m.target.push_back(pairs[r].second.second);
      into[pairs[r].second.first] = pairs[r].second.second;
    }
    const auto keep = [&](int64_t n) {
      if (n < t.length && into[n] < 0 && place[n] < 0) {
        place[n] = int64_t(kept.size());
        kept.push_back(n);
      }
    };
    if (order == MatchOrder::position)
      for (int64_t n = 0; n < t.length; ++n) keep(n);
    if (order == MatchOrder::similarity) {
      for (int64_t n = 0; n < protect; n += 2) keep(n);
      for (const auto& pair : pairs) keep(pair.second.first);
    }
    for (int64_t n = 0; n < t.length; n += 2) keep(n);
    for (int64_t n = 1; n < t.length; n += 2) keep(n);
    for (int64_t n = 0; n < t.length; ++n) m.assign.push_back(place[into[n] < 0 ? n : into[n]]);
    m.kept.insert(m.kept.end(), kept.begin(), kept.end());
  }
  return m;
}

// Rows x [batch, from_length] to be summed into slots, rows y [batch, length] to be moved by the same indices. Rows of
// weight 0 hold NaN: they are not read.
struct TokenRows {
  int64_t batch, from_length, length, width, stride;
  std::vector<float> x, y, weights;
  std::vector<int64_t> index;
  std::vector<double> sums, moved;

  TokenRows(int64_t batch_, int64_t from_length_, int64_t length_, int64_t width_, bool weighted)
      : batch(batch_), from_length(from_length_), length(length_), width(width_), stride(width_ + 3) {
    Numbers numbers(5);
    x = numbers.normal(batch * from_length * stride), y = numbers.normal(batch * length * stride);
    weights = numbers.normal(batch * from_length);
    index.resize(batch * from_length);
    for (int64_t& i : index) i = numbers.below(length + 1) - 1;
    for (int64_t n = 0; n < batch * from_length; ++n)
      if (numbers.below(4) == 0) {
        weights[n] = 0.0f;
        if (weighted) std::fill_n(x.begin() + n * stride, width, std::numeric_limits<float>::quiet_NaN());
      }
    if (!weighted) weights.clear();
    sums.resize(batch * length * width), moved.resize(batch * from_length * width);
    for (int64_t n = 0; n < batch * from_length; ++n) {
      if (index[n] < 0 || (weighted && weights[n] == 0.0f)) continue;
      const int64_t slot = n / from_length * length + index[n];
      const double factor = weighted ? double(weights[n]) : 1.0;
      for (int64_t e = 0; e < width; ++e) {
        sums[slot * width + e] += factor * x[n * stride + e];
        moved[n * width + e] = factor * y[slot * stride + e];
      }
    }
  }
  const float* given_weights() const { return weights.empty() ? nullptr : weights.data(); }
  TokenScatter scatter(float* to) const {
    return {batch, from_length, length, width, x.data(), from_length * stride, stride, index.data(), given_weights(),
            to};
  }
  TokenGather gather(float* to) const {
    return {batch, length, from_length, width, y.data(), length * stride, stride, 4, index.data(), given_weights(), to};
  }
};

// Rows of scores with many equals, NaN and -inf, to select from; checked against a stable sort.
struct SelectRows {
  int64_t batch, length;
  std::vector<float> scores;
  std::vector<int64_t> counts;
  std::vector<uint8_t> valid, always;
  std::vector<int64_t> index, found;

  SelectRows(int64_t B, int64_t N, int kinds, bool masks) : batch(B), length(N) {
    Numbers numbers(13);
    scores = numbers.normal(B * N);
    for (float& s : scores) {  // few values: many equals
      if (kinds > 0) s = float(numbers.below(kinds)) - float(kinds / 2);
      if (kinds > 0 && s == 0.0f && numbers.below(2)) s = -0.0f;
      if (numbers.below(17) == 0) s = numbers.below(2) ? NAN : -INFINITY;
    }
    for (int64_t b = 0; b < B; ++b) counts.push_back(b == 0 ? 0 : b == 1 ? N + 5 : numbers.below(N + 1));
    for (int64_t n = 0; n < (masks ? B * N : 0); ++n) {
      valid.push_back(numbers.below(4) > 0);
      always.push_back(numbers.below(6) == 0);
    }
  }
  TokenSelect call() {
    index.assign(batch * length, -7);
    found.assign(batch, -7);
    return {batch, length, scores.data(), counts.data(), valid.empty() ? nullptr : valid.data(),
            always.empty() ? nullptr : always.data(), index.data(), found.data()};
  }
  bool right() const {
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<int64_t> best, chosen;
      for (int64_t n = 0; n < length; ++n) {
        if (!valid.empty() && !valid[b * length + n]) continue;
        (!always.empty() && always[b * length + n] ? chosen : best).push_back(n);
      }
      const auto score = [&](int64_t n) {
        const float s = scores[b * length + n];
        return std::isnan(s) ? -INFINITY : s;
      };
      std::stable_sort(best.begin(), best.end(), [&](int64_t x, int64_t y) { return score(x) > score(y); });
      best.resize(std::min<std::size_t>(best.size(), std::size_t(counts[b])));
      chosen.insert(chosen.end(), best.begin(), best.end());
      std::sort(chosen.begin(), chosen.end());
      if (found[b] != int64_t(chosen.size())) return false;
      chosen.resize(length, -1);
      if (!std::equal(chosen.begin(), chosen.end(), index.begin() + b * length)) return false;
    }
    return true;
  }
};

// Weights of merges of 5 tokens into 3 slots; run(call) computes.
template <class Run>
void check_token_weights(Run run) {
  const std::vector<int64_t> assign = {0, 1, 1, 2, 2};
  const std::vector<float> sizes = {3, 1, 4, 0, 0};
  std::vector<float> w(5), totals(3);
  run(TokenWeights{1, 5, 3, assign.data(), sizes.data(), true, w.data(), totals.data()});
  check(w == std::vector<float>{1.0f, 0.2f, 0.8f, 0.5f, 0.5f} && totals == std::vector<float>{3, 5, 0},
        "weights by size");
  run(TokenWeights{1, 5, 3, assign.data(), nullptr, false, w.data(), totals.data()});
  check(w == std::vector<float>{1.0f, 0.5f, 0.5f, 0.5f, 0.5f} && totals == std::vector<float>{1, 2, 2},
        "weights by mean");
}

}  // namespace vlm::test
