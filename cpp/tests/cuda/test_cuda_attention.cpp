// The CUDA attention kernels against a float64 oracle that holds every score, in every order of execution.
#include <limits>

#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t batch, query_heads, key_heads, queries, keys, width, value_width;
  bool causal;
  int64_t offset;
  int mask;  // 0 none, 1 random keys, 2 the first sequence has none, 3 keys of a whole tile are missing
  int bias;  // 0 none, else 8 + 1 batch, 2 heads, 4 rows are full
  std::string name() const {
    std::string text = "B" + std::to_string(batch) + " H" + std::to_string(query_heads) + "/" +
                       std::to_string(key_heads) + " N" + std::to_string(queries) + " M" + std::to_string(keys) +
                       " D" + std::to_string(width) + " V" + std::to_string(value_width);
    return text + " causal" + std::to_string(causal) + " mask" + std::to_string(mask) + " bias" + std::to_string(bias);
  }
};

// Inputs lie in [B, N, H, D] order with a gap after each row.
struct Tensors {
  Case c;
  static constexpr int64_t gap = 3;
  std::vector<float> q, k, v, bias, dout, dlse;
  std::vector<uint8_t> mask;
  std::vector<float> out, lse, dq, dk, dv, dbias, sums;
  int64_t bias_batch, bias_heads, bias_rows;
  float scale;

  explicit Tensors(const Case& c_) : c(c_), scale(1.0f / std::sqrt(float(c_.width > 0 ? c_.width : 1))) {
    Numbers numbers(7);
    q = numbers.normal(c.batch * c.queries * c.query_heads * (c.width + gap));
    k = numbers.normal(c.batch * c.keys * c.key_heads * (c.width + gap));
    v = numbers.normal(c.batch * c.keys * c.key_heads * (c.value_width + gap));
    dout = numbers.normal(c.batch * c.query_heads * c.queries * c.value_width);
    dlse = numbers.normal(c.batch * c.query_heads * c.queries);
    if (c.mask) mask.resize(c.batch * c.keys);
    for (int64_t b = 0; b < (c.mask ? c.batch : 0); ++b)
      for (int64_t j = 0; j < c.keys; ++j) {
        mask[b * c.keys + j] = !(c.mask == 2 && b == 0) && !(c.mask == 3 && j / 64 == 1) && numbers.below(3) > 0;
        if (mask[b * c.keys + j]) continue;
        const float nan = std::numeric_limits<float>::quiet_NaN();
        for (int64_t g = 0; g < c.key_heads; ++g) {
          std::fill_n(k.begin() + at(b, j, g, c.keys, c.key_heads, c.width), c.width, nan);
          std::fill_n(v.begin() + at(b, j, g, c.keys, c.key_heads, c.value_width), c.value_width, nan);
        }
      }
    bias_batch = c.bias & 1 ? c.batch : 1;
    bias_heads = c.bias & 2 ? c.query_heads : 1;
    bias_rows = c.bias & 4 ? c.queries : 1;
    if (c.bias) bias = numbers.normal(bias_batch * bias_heads * bias_rows * c.keys);
    if (c.bias && c.keys > 2) bias[1] = -INFINITY;
    forget();
  }
  void forget() {  // results start as NaN
    const float nan = std::numeric_limits<float>::quiet_NaN();
    out.assign(c.batch * c.query_heads * c.queries * c.value_width, nan);
    lse.assign(c.batch * c.query_heads * c.queries, nan);
    dq.assign(c.batch * c.query_heads * c.queries * c.width, nan);
    dk.assign(c.batch * c.key_heads * c.keys * c.width, nan);
    dv.assign(c.batch * c.key_heads * c.keys * c.value_width, nan);
    dbias.assign(bias.size(), nan);
    sums.assign(c.batch * c.query_heads * c.keys, nan);
  }
  static int64_t at(int64_t b, int64_t n, int64_t h, int64_t length, int64_t heads, int64_t width) {
    return ((b * length + n) * heads + h) * (width + gap);
  }
  static Heads inside(const std::vector<float>& t, int64_t length, int64_t heads, int64_t width) {
    return {t.data(), length * heads * (width + gap), width + gap, heads * (width + gap)};
  }
  template <class View, class T>
  static View plain(T& t, int64_t heads, int64_t length, int64_t width) {
    return {t.data(), heads * length * width, length * width, width};
  }
  int64_t bias_at(int64_t b, int64_t h, int64_t i) const {
    return (((c.bias & 1 ? b : 0) * bias_heads + (c.bias & 2 ? h : 0)) * bias_rows + (c.bias & 4 ? i : 0)) * c.keys;
  }
  cuda::AttentionProblem problem() const {
    Heads b{nullptr, 0, 0, 0};
    if (c.bias)
      b = {bias.data(), c.bias & 1 ? bias_heads * bias_rows * c.keys : 0, c.bias & 2 ? bias_rows * c.keys : 0,
           c.bias & 4 ? c.keys : 0};
    return {c.batch, c.query_heads, c.key_heads, c.queries, c.keys, c.width, c.value_width,
            inside(q, c.queries, c.query_heads, c.width), inside(k, c.keys, c.key_heads, c.width),
            inside(v, c.keys, c.key_heads, c.value_width), scale, c.causal, c.offset,
            c.mask ? mask.data() : nullptr, c.keys, b};
  }
  void run() {
    forget();
    cuda::attention_forward({problem(), plain<MutableHeads>(out, c.query_heads, c.queries, c.value_width), lse.data()},
                            nullptr);
    std::vector<float> workspace(cuda::attention_backward_workspace(problem()) / 4, NAN);
    cuda::attention_backward({problem(), plain<Heads>(out, c.query_heads, c.queries, c.value_width), lse.data(),
                              plain<Heads>(dout, c.query_heads, c.queries, c.value_width), dlse.data(),
                              plain<MutableHeads>(dq, c.query_heads, c.queries, c.width),
                              plain<MutableHeads>(dk, c.key_heads, c.keys, c.width),
                              plain<MutableHeads>(dv, c.key_heads, c.keys, c.value_width),
                              c.bias ? dbias.data() : nullptr, bias_batch, bias_heads, bias_rows},
                             workspace.data(), nullptr);
    cuda::attention_column_sums({problem(), lse.data(), dlse.data(), sums.data()}, nullptr);  // any weights will do
  }
};

struct Oracle {
  std::vector<double> out, lse, dq, dk, dv, dbias, sums;
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
  o.sums.assign(t.sums.size(), 0.0);
  std::vector<double> p(c.keys);
  for (int64_t row = 0; row < c.batch * c.query_heads * c.queries; ++row) {
    const int64_t i = row % c.queries, h = row / c.queries % c.query_heads, b = row / c.queries / c.query_heads;
    const int64_t g = h / (c.query_heads / c.key_heads);
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
    double* out = o.out.data() + row * c.value_width;
    for (int64_t j = 0; j < c.keys; ++j) {
      p[j] = std::exp(p[j] - o.lse[row]);
      o.sums[(b * c.query_heads + h) * c.keys + j] += t.dlse[row] * p[j];
      for (int64_t e = 0; p[j] != 0.0 && e < c.value_width; ++e) out[e] += p[j] * value(j)[e];
    }
    for (int64_t e = 0; e < c.value_width; ++e) delta += double(dout[e]) * out[e];
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

bool close(const Tensors& t, const Oracle& o) {
  return error_between(t.out, o.out) <= 2e-6 && error_between(t.lse, o.lse) <= 2e-6 &&
         error_between(t.dq, o.dq) <= 1e-5 && error_between(t.dk, o.dk) <= 1e-5 && error_between(t.dv, o.dv) <= 1e-5 &&
         error_between(t.dbias, o.dbias) <= 1e-5 && error_between(t.sums, o.sums) <= 5e-6;
}

void compare(const Case& c) {
  Tensors t(c);
  const Oracle o = oracle(t);
  Tensors first(c);
  first.run();
  in_every_mode([&](const std::string& mode) {
    t.run();
    const std::string name = c.name() + " " + mode;
    check_close(t.out, o.out, 2e-6, name + " out");
    check_close(t.lse, o.lse, 2e-6, name + " lse");
    check_close(t.dq, o.dq, 1e-5, name + " dq");
    check_close(t.dk, o.dk, 1e-5, name + " dk");
    check_close(t.dv, o.dv, 1e-5, name + " dv");
    check_close(t.dbias, o.dbias, 1e-5, name + " dbias");
    check_close(t.sums, o.sums, 5e-6, name + " column sums");
    check(same_bits(t.out, first.out) && same_bits(t.dq, first.dq) && same_bits(t.dk, first.dk) &&
              same_bits(t.dv, first.dv) && same_bits(t.dbias, first.dbias) && same_bits(t.sums, first.sums),
          name + ": bits depend on the order of execution");
  });
}

}  // namespace

int main() {
  return run_emulated([] {
    compare({1, 1, 1, 1, 1, 1, 1, false, 0, 0, 0});
    compare({2, 1, 1, 0, 3, 4, 4, false, 0, 0, 8});
    compare({2, 1, 1, 3, 0, 4, 4, false, 0, 0, 0});
    compare({0, 1, 1, 3, 3, 4, 4, false, 0, 0, 0});
    compare({1, 1, 1, 3, 5, 0, 4, false, 0, 0, 0});
    // Around the borders of tiles: 32 and 64 rows, 64 columns; all three instances.
    for (int64_t n : {31, 33, 63, 64, 65})
      compare({1, 2, 1, n, n + 1, 17, 9, n % 2 == 1, 1, int(n % 2), n % 3 ? 15 : 0});
    compare({1, 2, 2, 29, 97, 64, 33, true, 97 - 29, 1, 0});
    compare({1, 1, 1, 65, 33, 66, 128, true, 0, 1, 12});
    compare({1, 2, 1, 33, 65, 256, 130, true, 32, 1, 14});
    for (int bias : {8, 9, 10, 13}) compare({2, 2, 1, 35, 66, 16, 16, bias % 2 == 0, 31, bias % 4, bias});
    compare({1, 1, 1, 20, 200, 8, 8, false, 0, 3, 12});
    compare({1, 2, 2, 70, 40, 12, 12, true, -30, 0, 0});  // bottom-right with fewer keys: empty rows
    // Enough tiles that every barrier matters.
    const Tensors small(Case{1, 2, 1, 130, 130, 8, 8, true, 0, 3, 8 + 2});
    const Oracle exact = oracle(small);
    every_barrier_is_needed("attention", [&] {
      Tensors t = small;
      t.run();
      return close(t, exact);
    });
  });
}
