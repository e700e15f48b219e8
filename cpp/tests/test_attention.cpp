// Exact attention against a float64 oracle that holds every score.
#include <limits>

#include "check.hpp"
#include "vlm/attention.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t batch, query_heads, key_heads, queries, keys, width, value_width;
  bool causal;
  int64_t offset;
  int mask;                             // 0 none, 1 random keys, 2 the first sequence has none
  int bias;                             // 0 none, else bit 1 batch, 2 heads, 4 rows are full (8 set: bias exists)
  std::string name() const {
    std::string text = "B" + std::to_string(batch) + " H" + std::to_string(query_heads) + "/" +
                       std::to_string(key_heads) + " N" + std::to_string(queries) + " M" + std::to_string(keys) +
                       " D" + std::to_string(width) + " V" + std::to_string(value_width);
    return text + " causal" + std::to_string(causal) + " mask" + std::to_string(mask) + " bias" + std::to_string(bias);
  }
};

// Everything a call reads and writes. Inputs lie in [B, N, H, D] order with a gap after each row.
struct Tensors {
  Case c;
  int64_t gap = 3;
  std::vector<float> q, k, v, bias, dout, dlse;
  std::vector<uint8_t> mask;
  std::vector<float> out, lse, dq, dk, dv, dbias;
  int64_t bias_batch = 1, bias_heads = 1, bias_rows = 1;
  float scale;

  Tensors(const Case& c_, uint64_t seed) : c(c_), scale(1.0f / std::sqrt(float(c_.width))) {
    Numbers numbers(seed);
    q = numbers.normal(c.batch * c.queries * c.query_heads * (c.width + gap));
    k = numbers.normal(c.batch * c.keys * c.key_heads * (c.width + gap));
    v = numbers.normal(c.batch * c.keys * c.key_heads * (c.value_width + gap));
    dout = numbers.normal(c.batch * c.query_heads * c.queries * c.value_width);
    dlse = numbers.normal(c.batch * c.query_heads * c.queries);
    if (c.mask) {
      mask.resize(c.batch * c.keys);
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t j = 0; j < c.keys; ++j) mask[b * c.keys + j] = !(c.mask == 2 && b == 0) && numbers.below(3) > 0;
      const float nan = std::numeric_limits<float>::quiet_NaN();
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t j = 0; j < c.keys; ++j)
          for (int64_t h = 0; h < c.key_heads; ++h) {
            if (mask[b * c.keys + j]) continue;
            for (int64_t e = 0; e < c.width; ++e) k[at(b, j, h, c.keys, c.key_heads, c.width) + e] = nan;
            for (int64_t e = 0; e < c.value_width; ++e) v[at(b, j, h, c.keys, c.key_heads, c.value_width) + e] = nan;
          }
    }
    if (c.bias) {
      bias_batch = c.bias & 1 ? c.batch : 1;
      bias_heads = c.bias & 2 ? c.query_heads : 1;
      bias_rows = c.bias & 4 ? c.queries : 1;
      bias = numbers.normal(bias_batch * bias_heads * bias_rows * c.keys);
    }
    out.resize(c.batch * c.query_heads * c.queries * c.value_width);
    lse.resize(c.batch * c.query_heads * c.queries);
    dq.resize(c.batch * c.query_heads * c.queries * c.width);
    dk.resize(c.batch * c.key_heads * c.keys * c.width);
    dv.resize(c.batch * c.key_heads * c.keys * c.value_width);
    dbias.resize(bias.size());
  }
  int64_t at(int64_t b, int64_t n, int64_t h, int64_t length, int64_t heads, int64_t width) const {
    return ((b * length + n) * heads + h) * (width + gap);
  }
  Heads inside(const std::vector<float>& t, int64_t length, int64_t heads, int64_t width) const {
    return {t.data(), length * heads * (width + gap), width + gap, heads * (width + gap)};
  }
  template <class View, class T>
  static View plain(T& t, int64_t heads, int64_t length, int64_t width) {
    return {t.data(), heads * length * width, length * width, width};
  }
  int64_t bias_at(int64_t b, int64_t h, int64_t i) const {
    return (((c.bias & 1 ? b : 0) * bias_heads + (c.bias & 2 ? h : 0)) * bias_rows + (c.bias & 4 ? i : 0)) * c.keys;
  }
  AttentionProblem problem() const {
    Heads b{nullptr, 0, 0, 0};
    if (c.bias)
      b = {bias.data(), c.bias & 1 ? bias_heads * bias_rows * c.keys : 0, c.bias & 2 ? bias_rows * c.keys : 0,
           c.bias & 4 ? c.keys : 0};
    return {c.batch, c.query_heads, c.key_heads, c.queries, c.keys, c.width, c.value_width,
            inside(q, c.queries, c.query_heads, c.width), inside(k, c.keys, c.key_heads, c.width),
            inside(v, c.keys, c.key_heads, c.value_width), scale, c.causal, c.offset,
            c.mask ? mask.data() : nullptr, c.keys, b};
  }
  void run(int threads) {
    attention_forward({problem(), plain<MutableHeads>(out, c.query_heads, c.queries, c.value_width), lse.data()},
                      threads);
    attention_backward({problem(), plain<Heads>(out, c.query_heads, c.queries, c.value_width), lse.data(),
                        plain<Heads>(dout, c.query_heads, c.queries, c.value_width), dlse.data(),
                        plain<MutableHeads>(dq, c.query_heads, c.queries, c.width),
                        plain<MutableHeads>(dk, c.key_heads, c.keys, c.width),
                        plain<MutableHeads>(dv, c.key_heads, c.keys, c.value_width),
                        c.bias ? dbias.data() : nullptr, bias_batch, bias_heads, bias_rows},
                       threads);
  }
};

struct Oracle {
  std::vector<double> out, lse, dq, dk, dv, dbias;
};

Oracle oracle(const Tensors& t) {
  const Case& c = t.c;
  Oracle o;
  o.out.assign(t.out.size(), 0.0);
  o.lse.assign(t.lse.size(), -INFINITY);
  o.dq.assign(t.dq.size(), 0.0);
  o.dk.assign(t.dk.size(), 0.0);
  o.dv.assign(t.dv.size(), 0.0);
  o.dbias.assign(t.dbias.size(), 0.0);
  std::vector<double> p(c.keys);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.query_heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        const int64_t g = h / (c.query_heads / c.key_heads), row = (b * c.query_heads + h) * c.queries + i;
        const float* q = t.q.data() + t.at(b, i, h, c.queries, c.query_heads, c.width);
        const auto key = [&](int64_t j) { return t.k.data() + t.at(b, j, g, c.keys, c.key_heads, c.width); };
        const auto value = [&](int64_t j) { return t.v.data() + t.at(b, j, g, c.keys, c.key_heads, c.value_width); };
        double top = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j < c.keys; ++j) {
          p[j] = -INFINITY;
          if ((c.causal && j > i + c.offset) || (c.mask && !t.mask[b * c.keys + j])) continue;
          double dot = 0.0;
          for (int64_t e = 0; e < c.width; ++e) dot += double(q[e]) * key(j)[e];
          p[j] = dot * t.scale + (c.bias ? t.bias[t.bias_at(b, h, i) + j] : 0.0);
          top = std::fmax(top, p[j]);
        }
        if (top == -INFINITY) continue;
        for (int64_t j = 0; j < c.keys; ++j) sum += std::exp(p[j] - top);
        o.lse[row] = top + std::log(sum);
        double delta = -double(t.dlse[row]);
        const float* dout = t.dout.data() + row * c.value_width;
        for (int64_t j = 0; j < c.keys; ++j) {
          p[j] = std::exp(p[j] - o.lse[row]);
          if (p[j] == 0.0) continue;
          for (int64_t e = 0; e < c.value_width; ++e) o.out[row * c.value_width + e] += p[j] * value(j)[e];
        }
        for (int64_t e = 0; e < c.value_width; ++e) delta += double(dout[e]) * o.out[row * c.value_width + e];
        for (int64_t j = 0; j < c.keys; ++j) {
          if (p[j] == 0.0) continue;
          const int64_t key_row = (b * c.key_heads + g) * c.keys + j;
          double dp = 0.0;
          for (int64_t e = 0; e < c.value_width; ++e) {
            dp += double(dout[e]) * value(j)[e];
            o.dv[key_row * c.value_width + e] += p[j] * dout[e];
          }
          const double ds = p[j] * (dp - delta);
          for (int64_t e = 0; e < c.width; ++e) {
            o.dq[row * c.width + e] += t.scale * ds * key(j)[e];
            o.dk[key_row * c.width + e] += t.scale * ds * q[e];
          }
          if (c.bias) o.dbias[t.bias_at(b, h, i) + j] += ds;
        }
      }
  return o;
}

void compare(const Case& c) {
  Tensors t(c, 7);
  t.run(1);
  const Oracle o = oracle(t);
  check_close(t.out, o.out, 2e-6, c.name() + " out");
  check_close(t.lse, o.lse, 2e-6, c.name() + " lse");
  check_close(t.dq, o.dq, 1e-5, c.name() + " dq");
  check_close(t.dk, o.dk, 1e-5, c.name() + " dk");
  check_close(t.dv, o.dv, 1e-5, c.name() + " dv");
  check_close(t.dbias, o.dbias, 1e-5, c.name() + " dbias");
  for (int threads : {2, 5}) {
    Tensors other(c, 7);
    other.run(threads);
    check(same_bits(t.out, other.out) && same_bits(t.lse, other.lse) && same_bits(t.dq, other.dq) &&
              same_bits(t.dk, other.dk) && same_bits(t.dv, other.dv) && same_bits(t.dbias, other.dbias),
          c.name() + ": bits differ with " + std::to_string(threads) + " threads");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    // Sizes around the tile borders of all levels: rows 6, 14, 48, 56, 96, 112; vectors 4, 8, 16; keys 256.
    compare({1, 1, 1, 1, 1, 1, 1, false, 0, 0, 0});
    compare({2, 1, 1, 0, 3, 4, 4, false, 0, 0, 0});
    compare({2, 1, 1, 3, 0, 4, 4, false, 0, 0, 0});
    compare({0, 1, 1, 3, 3, 4, 4, false, 0, 0, 0});
    for (int64_t n : {5, 6, 7, 13, 14, 15, 47, 48, 49, 55, 57, 97, 111, 113})
      compare({1, 2, 1, n, n + 1, 17, 9, n % 2 == 0, n % 3 == 0 ? 1 : 0, int(n % 2), n % 3 == 1 ? 15 : 0});
    for (int64_t m : {31, 32, 33, 255, 256, 257, 521}) compare({1, 2, 2, 29, m, 16, 33, m % 2 == 1, m - 29, 1, 0});
    for (int mask : {0, 1, 2})
      for (int bias : {0, 8, 9, 10, 12, 13, 14, 15})
        for (bool causal : {false, true}) compare({3, 4, 2, 59, 261, 16, 16, causal, 202, mask, bias});
    compare({1, 2, 2, 130, 70, 32, 32, true, -60, 0, 0});  // bottom-right with fewer keys: empty rows
    compare({2, 16, 16, 120, 120, 64, 64, true, 0, 1, 0});  // many heads: one chunk of keys each
    compare({1, 3, 3, 20, 1100, 8, 8, false, 0, 1, 15});    // several chunks of keys
  });
}
