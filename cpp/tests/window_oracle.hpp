// Windowed cosine attention in float64 over all pairs of a map, from the definition of vlm/window_attention.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vlm/window_attention.hpp"

namespace vlm::test {

// Where a place of one axis lies after the roll: window, place inside it, and whether it wrapped around.
struct Place {
  int64_t window, inside;
  bool wrapped;
};
inline Place place_of(int64_t at, int64_t size, int64_t window, int64_t shift) {
  const int64_t padded = (size + window - 1) / window * window, rolled = (at - shift + padded) % padded;
  return {rolled / window, rolled % window, at < shift};
}

// Contiguous, in the extents of vlm/window_attention.hpp.
struct WindowAnswer {
  std::vector<double> out, lse, dqkv, dtau, dtable;
};

// Of the call, its problem and upstream gradient are read; not its results.
inline WindowAnswer window_oracle(const WindowAttentionBackward& call) {
  const WindowAttentionProblem& c = call.problem;
  const int64_t n = c.rows * c.columns, D = c.width, channels = c.heads * c.width;
  WindowAnswer o;
  o.out.resize(c.batch * n * channels);
  o.lse.resize(c.batch * n * c.heads);
  o.dqkv.resize(c.batch * n * 3 * channels);
  o.dtau.resize(c.heads);
  o.dtable.resize((2 * c.window_rows - 1) * (2 * c.window_columns - 1) * c.heads);
  const auto at = [&](const Heads& map, int64_t b, int64_t i) {
    return map.data + b * map.batch_stride + i / c.columns * map.head_stride + i % c.columns * map.row_stride;
  };
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h) {
      auto input = [&](int64_t part, int64_t i) { return at(c.qkv, b, i) + part * channels + h * D; };
      auto length = [&](int64_t part, int64_t i) {
        double sum = 0;
        for (int64_t e = 0; e < D; ++e) sum += double(input(part, i)[e]) * input(part, i)[e];
        return std::fmax(std::sqrt(sum), 1e-12);
      };
      for (int64_t i = 0; i < n; ++i) {
        const Place y = place_of(i / c.columns, c.rows, c.window_rows, c.shift_rows);
        const Place x = place_of(i % c.columns, c.columns, c.window_columns, c.shift_columns);
        std::vector<int64_t> keys, offsets;
        std::vector<double> cosines, logits;
        double top = -INFINITY;
        for (int64_t j = 0; j < n; ++j) {
          const Place v = place_of(j / c.columns, c.rows, c.window_rows, c.shift_rows);
          const Place u = place_of(j % c.columns, c.columns, c.window_columns, c.shift_columns);
          if (v.window != y.window || u.window != x.window || v.wrapped != y.wrapped || u.wrapped != x.wrapped)
            continue;
          double cosine = 0;
          for (int64_t e = 0; e < D; ++e) cosine += double(input(0, i)[e]) * input(1, j)[e];
          cosine /= length(0, i) * length(1, j);
          const int64_t offset = (y.inside - v.inside + c.window_rows - 1) * (2 * c.window_columns - 1) + x.inside -
                                 u.inside + c.window_columns - 1;
          keys.push_back(j);
          offsets.push_back(offset);
          cosines.push_back(cosine);
          logits.push_back(c.tau[h] * cosine + c.bias_table[offset * c.heads + h]);
          top = std::fmax(top, logits.back());
        }
        double sum = 0;
        for (double s : logits) sum += std::exp(s - top);
        o.lse[((b * c.heads + h) * n) + i] = top + std::log(sum);
        const float* dout = at(call.dout, b, i) + h * D;
        double lean = 0;
        std::vector<double> slope(keys.size());
        for (std::size_t k = 0; k < keys.size(); ++k) {
          const double p = std::exp(logits[k] - top) / sum;
          for (int64_t e = 0; e < D; ++e) {
            const double v = input(2, keys[k])[e];
            o.out[(b * n + i) * channels + h * D + e] += p * v;
            slope[k] += dout[e] * v;
            o.dqkv[(b * n + keys[k]) * 3 * channels + 2 * channels + h * D + e] += p * dout[e];
          }
          lean += p * slope[k];
        }
        for (std::size_t k = 0; k < keys.size(); ++k) {
          const double ds = std::exp(logits[k] - top) / sum * (slope[k] - lean);
          o.dtau[h] += ds * cosines[k];
          o.dtable[offsets[k] * c.heads + h] += ds;
          const double lq = length(0, i), lk = length(1, keys[k]);
          for (int64_t e = 0; e < D; ++e) {
            const double q = input(0, i)[e] / lq, key = input(1, keys[k])[e] / lk;
            o.dqkv[(b * n + i) * 3 * channels + h * D + e] += ds * c.tau[h] * (key - q * cosines[k]) / lq;
            o.dqkv[(b * n + keys[k]) * 3 * channels + channels + h * D + e] +=
                ds * c.tau[h] * (q - key * cosines[k]) / lk;
          }
        }
      }
    }
  return o;
}

}  // namespace vlm::test
