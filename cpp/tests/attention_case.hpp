// Tensors of an attention call, for the kernels of every device: ragged strides, NaN where the key mask removes.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "attention_oracle.hpp"
#include "check.hpp"

namespace vlm::test {

struct AttentionCase {
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
struct AttentionTensors {
  AttentionCase c;
  static constexpr int64_t gap = 3;
  std::vector<float> q, k, v, bias, dout, dlse;
  std::vector<uint8_t> mask;
  std::vector<MaskAtom> atoms;  // of whoever sets them
  std::vector<float> relative;  // [query_heads or 1, queries + keys - 1], of give_table
  std::vector<float> out, lse, dq, dk, dv, dbias, drelative, sums;
  int64_t bias_batch, bias_heads, bias_rows;
  float scale;

  explicit AttentionTensors(const AttentionCase& c_)
      : c(c_), scale(1.0f / std::sqrt(float(c_.width > 0 ? c_.width : 1))) {
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
  void give_table(std::vector<float> table) {
    relative = std::move(table);
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
    drelative.assign(relative.size(), nan);
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
  AttentionProblem problem() const {
    Heads b{nullptr, 0, 0, 0};
    if (c.bias)
      b = {bias.data(), c.bias & 1 ? bias_heads * bias_rows * c.keys : 0, c.bias & 2 ? bias_rows * c.keys : 0,
           c.bias & 4 ? c.keys : 0};
    AttentionProblem p{
            c.batch, c.query_heads, c.key_heads, c.queries, c.keys, c.width, c.value_width,
            inside(q, c.queries, c.query_heads, c.width), inside(k, c.keys, c.key_heads, c.width),
            inside(v, c.keys, c.key_heads, c.value_width), scale, c.causal, c.offset,
            c.mask ? mask.data() : nullptr, c.keys, b, atoms.data(), static_cast<int64_t>(atoms.size())};
    if (relative.empty()) return p;
    p.relative = relative.data();
    const int64_t places = c.queries + c.keys - 1;
    p.relative_head_stride = static_cast<int64_t>(relative.size()) > places ? places : 0;
    return p;
  }
  AttentionForward forward() {
    return {problem(), plain<MutableHeads>(out, c.query_heads, c.queries, c.value_width), lse.data()};
  }
  AttentionBackward backward() const {
    auto& to = const_cast<AttentionTensors&>(*this);
    return {problem(), plain<Heads>(out, c.query_heads, c.queries, c.value_width), lse.data(),
            plain<Heads>(dout, c.query_heads, c.queries, c.value_width), dlse.data(),
            plain<MutableHeads>(to.dq, c.query_heads, c.queries, c.width),
            plain<MutableHeads>(to.dk, c.key_heads, c.keys, c.width),
            plain<MutableHeads>(to.dv, c.key_heads, c.keys, c.value_width),
            c.bias ? to.dbias.data() : nullptr, bias_batch, bias_heads, bias_rows,
            relative.empty() ? nullptr : to.drelative.data()};
  }
};

inline bool same_results(const AttentionTensors& a, const AttentionTensors& b) {
  return same_bits(a.out, b.out) && same_bits(a.lse, b.lse) && same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) &&
         same_bits(a.dv, b.dv) && same_bits(a.dbias, b.dbias) && same_bits(a.drelative, b.drelative);
}

inline bool close_to(const AttentionTensors& t, const AttentionAnswer& o) {
  return error_between(t.out, o.out) <= 2e-6 && error_between(t.lse, o.lse) <= 2e-6 &&
         error_between(t.dq, o.dq) <= 1e-5 && error_between(t.dk, o.dk) <= 1e-5 && error_between(t.dv, o.dv) <= 1e-5 &&
         error_between(t.dbias, o.dbias) <= 1e-5 && error_between(t.drelative, o.drelative) <= 1e-5;
}

inline void check_close_to(const AttentionTensors& t, const AttentionAnswer& o, const std::string& name) {
  check_close(t.out, o.out, 2e-6, name + " out");
  check_close(t.lse, o.lse, 2e-6, name + " lse");
  check_close(t.dq, o.dq, 1e-5, name + " dq");
  check_close(t.dk, o.dk, 1e-5, name + " dk");
  check_close(t.dv, o.dv, 1e-5, name + " dv");
  check_close(t.dbias, o.dbias, 1e-5, name + " dbias");
  check_close(t.drelative, o.drelative, 1e-5, name + " drelative");
}

}  // namespace vlm::test
