// Exact attention against a float64 oracle that holds every score.
#include <limits>
#include <stdexcept>

#include "attention_oracle.hpp"
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
  AttentionBackward call() {
    return {problem(), plain<Heads>(out, c.query_heads, c.queries, c.value_width), lse.data(),
            plain<Heads>(dout, c.query_heads, c.queries, c.value_width), dlse.data(),
            plain<MutableHeads>(dq, c.query_heads, c.queries, c.width),
            plain<MutableHeads>(dk, c.key_heads, c.keys, c.width),
            plain<MutableHeads>(dv, c.key_heads, c.keys, c.value_width),
            c.bias ? dbias.data() : nullptr, bias_batch, bias_heads, bias_rows};
  }
  void run(int threads) {
    attention_forward({problem(), plain<MutableHeads>(out, c.query_heads, c.queries, c.value_width), lse.data()},
                      threads);
    attention_backward(call(), threads);
  }
};

void compare(const Case& c) {
  Tensors t(c, 7);
  t.run(1);
  const AttentionAnswer o = attention_oracle(t.call());
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

// Temperatures that lie apart, are shared, or are 0: the gradient of each is that of its own head.
void temperatures(int64_t stride) {
  Tensors t({2, 4, 2, 21, 33, 12, 8, true, 12, 1, 0}, 7);
  const std::vector<float> temperature{0.0f, 5.0f, -1.5f, 5.0f, 0.7f, 5.0f, 2.0f};
  std::vector<float> gradient(stride == 0 ? 1 : 4);
  AttentionBackward call = t.call();
  call.problem.temperature = temperature.data() + (stride == 0 ? 2 : 0);
  call.problem.temperature_stride = stride;
  call.dtemperature = gradient.data();
  attention_forward({call.problem, Tensors::plain<MutableHeads>(t.out, 4, 21, 8), t.lse.data()}, 1);
  attention_backward(call, 2);
  const AttentionAnswer o = attention_oracle(call);
  check_close(t.out, o.out, 2e-6, "temperature out");
  check_close(t.dq, o.dq, 1e-5, "temperature dq");
  check_close(t.dk, o.dk, 1e-5, "temperature dk");
  check_close(gradient, o.dtemperature, 1e-5, "temperature gradient, stride " + std::to_string(stride));
}

// An offset at the end of its range sees all keys, or none.
void far_offsets() {
  for (int64_t offset : {INT64_MAX, INT64_MIN, int64_t(INT32_MAX), int64_t(INT32_MIN)})
    compare({1, 2, 1, 8, 17, 4, 4, true, offset, 0, 0});
}

void what_does_not_fit_is_refused() {
  Tensors t({1, 2, 1, 4, 6, 3, 3, false, 0, 0, 0}, 7);
  const auto refused = [&](const char* what, auto spoil) {
    AttentionProblem p = t.problem();
    spoil(p);
    try {
      attention_forward({p, Tensors::plain<MutableHeads>(t.out, 2, 4, 3), t.lse.data()}, 1);
      check(false, std::string(what) + " was taken");
    } catch (const std::invalid_argument&) {
    }
  };
  refused("a negative width", [](AttentionProblem& p) { p.width = -1; });
  refused("3 query heads of 2", [](AttentionProblem& p) { p.query_heads = 3, p.key_heads = 2; });
  refused("a cap that is not a number", [](AttentionProblem& p) { p.softcap = NAN; });
  refused("a share that is not a number", [](AttentionProblem& p) { p.keep_share = NAN; });
  refused("more keys than int32 counts", [](AttentionProblem& p) { p.batch = 0, p.keys = int64_t(1) << 31; });
  const float table[1] = {0.0f};
  refused("a grid whose product wraps around", [&](AttentionProblem& p) {
    p.relative = table, p.keys = 4, p.grid_columns = 4, p.grid_rows = (int64_t(1) << 62) + 1;
  });
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
    for (int64_t stride : {0, 1, 2}) temperatures(stride);
    far_offsets();
    what_does_not_fit_is_refused();
  });
}
