// Token reduction against loops written from the definitions.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "vlm/tokens.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

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
  Matched run(int64_t merged, int64_t protect, MatchOrder order, int threads) const {
    Matched m{std::vector<int64_t>(batch * merged), std::vector<int64_t>(batch * merged),
              std::vector<int64_t>(batch * (length - merged)), std::vector<int64_t>(batch * length)};
    const int64_t row = heads * (width + gap);
    token_match({batch, heads, length, width, values.data(), length * row, width + gap, row, merged, protect, order,
                 m.source.data(), m.target.data(), m.kept.data(), m.assign.data()},
                threads);
    return m;
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

Matched by_hand(const Metric& t, int64_t merged, int64_t protect, MatchOrder order) {
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

void match(int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t protect) {
  const Metric t(batch, heads, length, width, 11);
  const int64_t most = std::max<int64_t>(length - protect, 0) / 2;
  for (MatchOrder order : {MatchOrder::sources_first, MatchOrder::position, MatchOrder::similarity})
    for (int64_t merged : {int64_t(0), most / 2, most}) {
      const std::string name = "match N" + std::to_string(length) + " protect" + std::to_string(protect) + " r" +
                               std::to_string(merged) + " order" + std::to_string(int(order));
      const Matched got = t.run(merged, protect, order, 1);
      check(got == by_hand(t, merged, protect, order), name);
      for (int threads : {2, 5}) check(got == t.run(merged, protect, order, threads), name + " threads");
    }
}

void rows(int64_t batch, int64_t from_length, int64_t length, int64_t width) {
  const std::string name = "rows " + std::to_string(from_length) + " " + std::to_string(length) + " " +
                           std::to_string(width);
  Numbers numbers(5);
  const int64_t stride = width + 3;
  std::vector<float> x = numbers.normal(batch * from_length * stride), y = numbers.normal(batch * length * stride);
  std::vector<float> weights = numbers.normal(batch * from_length);
  std::vector<int64_t> index(batch * from_length);
  for (int64_t& i : index) i = numbers.below(length + 1) - 1;
  for (int64_t n = 0; n < batch * from_length; ++n)
    if (numbers.below(4) == 0) {
      weights[n] = 0.0f;  // not read
      for (int64_t e = 0; e < width; ++e) x[n * stride + e] = std::numeric_limits<float>::quiet_NaN();
    }
  for (bool weighted : {true, false}) {
    if (!weighted)
      for (float& v : x) v = v == v ? v : 0.5f;
    const float* w = weighted ? weights.data() : nullptr;
    std::vector<double> sums(batch * length * width), moved(batch * from_length * width);
    for (int64_t n = 0; n < batch * from_length; ++n) {
      if (index[n] < 0 || (w != nullptr && w[n] == 0.0f)) continue;
      const int64_t slot = n / from_length * length + index[n];
      const double factor = w == nullptr ? 1.0 : double(w[n]);
      for (int64_t e = 0; e < width; ++e) {
        sums[slot * width + e] += factor * x[n * stride + e];
        moved[n * width + e] = factor * y[slot * stride + e];
      }
    }
    std::vector<float> first_sums, first_moved;
    for (int threads : {1, 2, 5}) {
      std::vector<float> s(batch * length * width), g(batch * from_length * width);
      token_scatter(
          {batch, from_length, length, width, x.data(), from_length * stride, stride, index.data(), w, s.data()},
          threads);
      token_gather({batch, length, from_length, width, y.data(), length * stride, stride, 4, index.data(), w, g.data()},
                   threads);
      if (threads == 1) {
        check_close(s, sums, 2e-6, name + " scatter");
        check_close(g, moved, 1e-7, name + " gather");
        first_sums = s;
        first_moved = g;
      }
      check(same_bits(s, first_sums) && same_bits(g, first_moved), name + ": bits differ");
    }
  }
}

void select() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = INFINITY;
  const std::vector<float> scores = {1, 3, nan, 3, -0.0f, 0.0f, -inf, inf};
  const std::vector<uint8_t> valid = {1, 1, 1, 1, 1, 1, 1, 0}, always = {0, 0, 0, 0, 0, 0, 0, 0};
  const std::vector<std::vector<int64_t>> expected = {
      {}, {1}, {1, 3}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 3, 4, 5}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 6}};
  for (int64_t k = -1; k < 12; ++k) {
    std::vector<int64_t> index(8), found(1);
    token_select({1, 8, scores.data(), &k, valid.data(), always.data(), index.data(), found.data()}, 2);
    std::vector<int64_t> want = expected[std::clamp<int64_t>(k, 0, 7)];
    check(found[0] == int64_t(want.size()), "select count " + std::to_string(k));
    want.resize(8, -1);
    check(index == want, "select " + std::to_string(k));
  }
  const std::vector<uint8_t> guarded = {0, 0, 1, 0, 0, 0, 1, 1};
  std::vector<int64_t> index(8), found(1);
  const int64_t two = 2;
  token_select({1, 8, scores.data(), &two, valid.data(), guarded.data(), index.data(), found.data()}, 1);
  check(index == std::vector<int64_t>{1, 2, 3, 6, -1, -1, -1, -1}, "select: protected besides, not valid never");
}

void weights() {
  const std::vector<int64_t> assign = {0, 1, 1, 2, 2};
  const std::vector<float> sizes = {3, 1, 4, 0, 0};
  std::vector<float> w(5), totals(3);
  token_weights({1, 5, 3, assign.data(), sizes.data(), true, w.data(), totals.data()});
  check(w == std::vector<float>{1.0f, 0.2f, 0.8f, 0.5f, 0.5f} && totals == std::vector<float>{3, 5, 0},
        "weights by size");
  token_weights({1, 5, 3, assign.data(), nullptr, false, w.data(), totals.data()});
  check(w == std::vector<float>{1.0f, 0.5f, 0.5f, 0.5f, 0.5f} && totals == std::vector<float>{1, 2, 2},
        "weights by mean");
}

template <class Body>
void refused(const std::string& what, Body body) {
  try {
    body();
  } catch (const std::invalid_argument&) {
    return;
  }
  check(false, what + " is not refused");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (int64_t n : {0, 1, 2, 3, 11, 12, 27, 28, 29, 64, 113, 197})
      for (int64_t protect : {0, 1, 2, 3}) match(2, n % 2 ? 1 : 3, n, 17, protect);
    match(1, 1, 1033, 24, 1);  // more destinations than a tile
    match(0, 1, 9, 4, 1);
    for (int64_t width : {0, 1, 15, 16, 17, 700}) rows(3, 41, 20, width);
    rows(2, 0, 5, 8);
    rows(2, 300, 1, 400);
    select();
    weights();
    const std::vector<int64_t> outside = {2}, none = {-1};
    const std::vector<float> one = {1.0f};
    std::vector<float> out(2);
    refused("an index beyond the slots", [&] {
      token_scatter({1, 1, 2, 1, one.data(), 1, 1, outside.data(), nullptr, out.data()}, 1);
    });
    refused("an index beyond the rows", [&] {
      token_gather({1, 1, 1, 1, one.data(), 1, 1, 4, outside.data(), nullptr, out.data()}, 1);
    });
    refused("elements of no byte", [&] {
      token_gather({1, 1, 1, 1, one.data(), 1, 1, 0, none.data(), nullptr, out.data()}, 1);
    });
    refused("an unknown order", [&] { Metric(1, 1, 5, 4, 1).run(1, 0, static_cast<MatchOrder>(3), 1); });
    refused("too many merges", [&] { Metric(1, 1, 5, 4, 1).run(3, 0, MatchOrder::position, 1); });
    refused("a negative size", [&] { token_weights({1, -1, 1, nullptr, nullptr, true, nullptr, nullptr}); });
  });
}
