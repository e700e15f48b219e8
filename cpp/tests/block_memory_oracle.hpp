// The definition of vlm/block_memory.hpp in double, query by query. Where two scores are so near that rounding may turn
// their order, the kernel's choice is taken over, after a look whether it is one of the best.
#pragma once

#include <algorithm>
#include <string>

#include "check.hpp"
#include "vlm/block_memory.hpp"

namespace vlm::test {

// Rotary tables [rows, width / 2] of base 10000.
struct Angles {
  std::vector<float> cosines, sines;
  Angles(int64_t rows, int64_t width) {
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t e = 0; e < width / 2; ++e) {
        const double angle = double(p) * std::pow(10000.0, -2.0 * double(e) / double(width));
        cosines.push_back(float(std::cos(angle)));
        sines.push_back(float(std::sin(angle)));
      }
  }
};

inline int64_t memory_blocks(const BlockMemoryForward& c, int64_t start) {
  return std::max<int64_t>(0, std::max<int64_t>(0, start - c.window + 1) - c.first_tokens) / c.block;
}
inline int64_t last_chunk(const BlockMemoryForward& c) {
  return c.keys - c.queries + (c.queries == 0 ? 0 : (c.queries - 1) / c.chunk * c.chunk);
}

using Row = std::vector<double>;

inline Row memory_row(const Heads& x, int64_t head, int64_t row, int64_t width) {
  const float* from = x.data + head * x.head_stride + row * x.row_stride;
  return Row(from, from + width);
}

inline Row turned(const BlockMemoryForward& c, const Row& x, int64_t position) {
  Row y(x.size());
  for (int64_t e = 0, half = c.width / 2; e < half; ++e) {
    const double cosine = c.cosines.data[position * c.cosines.row_stride + e];
    const double sine = c.sines.data[position * c.sines.row_stride + e];
    y[e] = x[e] * cosine - x[half + e] * sine;
    y[half + e] = x[half + e] * cosine + x[e] * sine;
  }
  return y;
}

inline double product(const Row& a, const Row& b) {
  double sum = 0.0;
  for (std::size_t e = 0; e < a.size(); ++e) sum += a[e] * b[e];
  return sum;
}

// What is wrong with the results of a call that was made; empty if nothing is. before: `score` as it was given.
inline std::string judge(const BlockMemoryForward& c, const std::vector<float>& before, double tolerance) {
  const int64_t offset = c.keys - c.queries, group = c.heads / c.key_heads, from = offset - c.scored;
  const int64_t columns = c.scored + c.queries;
  std::vector<double> score(before.begin(), before.end());
  std::vector<std::vector<Row>> means(c.heads);
  std::vector<double> out, want_out;
  for (int64_t h = 0; h < c.heads; ++h)
    for (int64_t b = 0; b < c.formed; ++b) means[h].push_back(memory_row(c.means, h, b, c.width));
  for (int64_t first = 0, number = 0; first < c.queries; first += c.chunk, ++number) {
    const int64_t start = offset + first, n = std::min(c.chunk, c.queries - first);
    const int64_t gone = std::max<int64_t>(0, start - c.window + 1), blocks = memory_blocks(c, start);
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t b = int64_t(means[h].size()); b < blocks; ++b) {
        const int64_t r = std::min(c.representatives, c.block), at = c.first_tokens + b * c.block;
        std::vector<int64_t> order(c.block);
        for (int64_t j = 0; j < c.block; ++j) order[j] = at + j;
        const double* own = score.data() + h * columns - from;
        std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return own[x] > own[y]; });
        // All that lie near the border may change places in float, also across those that are equal to it.
        bool tied = false;
        if (r < c.block) {
          const double border = own[order[r - 1]], near = 1e-5 * (1.0 + own[order[r]]);
          bool differ = false;
          for (int64_t j : order) differ |= own[j] != border && std::fabs(own[j] - border) < near;
          tied = differ && border - own[order[r]] < near;
        }
        Row mean(c.width, 0.0);
        for (int64_t i = 0; i < r; ++i)
          for (int64_t e = 0; e < c.width; ++e)
            mean[e] += c.k.data[h / group * c.k.head_stride + order[i] * c.k.row_stride + e] / double(r);
        const float* found = c.added + (h * c.more + b - c.formed) * c.width;
        const Row kernel(found, found + c.width);
        if (!tied && error_between(kernel, mean) > tolerance) return "representatives";
        means[h].push_back(tied ? kernel : mean);
      }
    const int32_t* chosen = c.chosen + number * c.places;
    const int64_t count = std::min(c.topk, blocks);
    for (int64_t i = 0; i < c.places; ++i) {
      if (i >= count ? chosen[i] != -1 : chosen[i] < 0 || chosen[i] >= blocks) return "chosen is outside";
      if (i > 0 && i < count && chosen[i] <= chosen[i - 1]) return "chosen does not ascend";
    }
    if (blocks > count && count > 0) {
      std::vector<double> fits(blocks, 0.0);
      for (int64_t h = 0; h < c.heads; ++h) {
        Row mean(c.width, 0.0);
        for (int64_t i = first; i < first + n; ++i) {
          const Row q = turned(c, memory_row(c.q, h, i, c.width), c.window - 1);
          for (int64_t e = 0; e < c.width; ++e) mean[e] += q[e] / double(n);
        }
        for (int64_t b = 0; b < blocks; ++b) fits[b] += product(mean, means[h][b]);
      }
      double worst = INFINITY, best = -INFINITY;
      for (int64_t b = 0; b < blocks; ++b) {
        const bool taken = std::binary_search(chosen, chosen + count, int32_t(b));
        (taken ? worst : best) = taken ? std::min(worst, fits[b]) : std::max(best, fits[b]);
      }
      if (worst < best - 1e-4 * (1.0 + std::fabs(best))) return "other blocks fit better";
    }
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = first; i < first + n; ++i) {
        const int64_t p = offset + i;
        const Row q = memory_row(c.q, h, i, c.width);
        const Row far = p < c.window ? q : turned(c, q, c.window - 1);  // the table need not reach a window that holds all
        std::vector<std::pair<int64_t, double>> logits;
        for (int64_t j = 0; j <= p; ++j) {
          const Row k = memory_row(c.k, h / group, j, c.width);
          const int64_t block = j < c.first_tokens ? -1 : (j - c.first_tokens) / c.block;
          const bool listed = block < 0 || block >= blocks || std::binary_search(chosen, chosen + count, int32_t(block));
          if (p - j >= c.window && !listed) continue;
          const int64_t base = c.absolute ? 0 : gone;
          const bool fixed = p - j >= c.window && !c.absolute;
          logits.push_back({j, c.scale * (fixed ? product(far, k) : product(turned(c, q, p - base), turned(c, k, j - base)))});
        }
        double top = -INFINITY, sum = 0.0;
        for (const auto& [j, x] : logits) top = std::max(top, x);
        for (const auto& [j, x] : logits) sum += std::exp(x - top);
        Row row(c.width, 0.0);
        for (const auto& [j, x] : logits) {
          const double weight = std::exp(x - top) / sum;
          for (int64_t e = 0; e < c.width; ++e)
            row[e] += weight * c.v.data[h / group * c.v.head_stride + j * c.v.row_stride + e];
          if (p - j < c.window) score[h * columns + j - from] += weight;
        }
        want_out.insert(want_out.end(), row.begin(), row.end());
        const float* found = c.out.data + h * c.out.head_stride + i * c.out.row_stride;
        out.insert(out.end(), found, found + c.width);
      }
  }
  if (error_between(out, want_out) > tolerance) return "out: error " + std::to_string(error_between(out, want_out));
  const std::vector<float> found(c.score, c.score + c.heads * columns);
  if (error_between(found, score) > tolerance) return "score: error " + std::to_string(error_between(found, score));
  return "";
}

}  // namespace vlm::test
