// Exact attention in float64, from the definitions of vlm/attention.hpp and vlm/mask.hpp, one pair at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vlm/attention.hpp"

namespace vlm::test {

inline bool atom_allows(const MaskAtom& t, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t d = i + t.n[0] - j;
  const auto* a = static_cast<const int32_t*>(t.a);
  const auto* key_array = static_cast<const int32_t*>(t.b);
  if (a != nullptr) a += b * t.a_batch;
  if (key_array != nullptr) key_array += b * t.b_batch;
  switch (t.kind) {
    case AtomKind::band:
    case AtomKind::local_band: return -t.n[2] <= d && d <= t.n[1];
    case AtomKind::block_causal: return i + t.n[0] >= 0 && (i + t.n[0]) / t.n[1] >= j / t.n[1];
    case AtomKind::prefix: return j < a[0] || d >= 0;
    case AtomKind::lambda: return d >= 0 && (d < t.n[1] || j < t.n[2]);
    case AtomKind::spans: return d >= 0 || (a[i] == key_array[j] && a[i] >= 0);
    case AtomKind::ids:
      return a[i] == key_array[j] || (t.n[0] && key_array[j] == t.n[1]) || (t.n[2] && a[i] == t.n[3]);
    case AtomKind::rows: return a[2 * i] <= j && j < a[2 * i + 1];
    case AtomKind::global: return a[i] != 0 || key_array[j] != 0;
    case AtomKind::dense:
      return static_cast<const uint8_t*>(t.a)[b * t.a_batch + h * t.a_head + i * t.a_row + j] != 0;
    case AtomKind::blocks: {
      const int64_t block = i / t.n[0];
      const int32_t* list = a + h * t.a_head + block * t.n[2];
      for (int32_t s = 0; s < key_array[h * t.b_head + block]; ++s)
        if (list[s] == j / t.n[1]) return true;
      return false;
    }
  }
  return false;
}

inline bool is_local(AtomKind kind) {
  return kind == AtomKind::local_band || kind == AtomKind::lambda || kind == AtomKind::blocks;
}

inline bool allowed(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (p.causal && j - i > p.causal_offset) return false;
  if (p.key_mask != nullptr && p.key_mask[b * p.key_mask_stride + j] == 0) return false;
  bool open = false;
  for (int64_t t = 0; t < p.atom_count; ++t)
    open = open || (p.atoms[t].kind == AtomKind::global && atom_allows(p.atoms[t], b, h, i, j));
  for (int64_t t = 0; t < p.atom_count; ++t) {
    const MaskAtom& atom = p.atoms[t];
    if (atom.kind == AtomKind::global || (open && is_local(atom.kind))) continue;
    if (!atom_allows(atom, b, h, i, j)) return false;
  }
  return true;
}

// Whether dropout leaves pair (i, j): the hash of core/random.hpp, written again.
inline bool survives(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const auto mix = [](uint32_t x) {
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return x ^ x >> 16;
  };
  const uint32_t step = 0x9E3779B1u;
  uint32_t key = mix(uint32_t(p.seed) ^ mix(uint32_t(p.seed >> 32) + step));
  for (int64_t counter : {b, h, i}) key = mix(key + uint32_t(counter) * step);
  return mix(key + uint32_t(j) * step) >= p.drop_below;
}

inline const float* row_of(const Heads& t, int64_t b, int64_t h, int64_t n) {
  return t.data + b * t.batch_stride + h * t.head_stride + n * t.row_stride;
}

inline int64_t relative_length(const AttentionProblem& p) {
  return p.grid_columns > 0 ? (2 * p.grid_rows - 1) * (2 * p.grid_columns - 1) : p.queries + p.keys - 1;
}

inline int64_t relative_index(const AttentionProblem& p, int64_t i, int64_t j) {
  if (p.grid_columns <= 0) return p.queries - 1 - i + j;
  const int64_t columns = p.grid_columns, dy = j / columns - i / columns, dx = j % columns - i % columns;
  return (dy + p.grid_rows - 1) * (2 * columns - 1) + dx + columns - 1;
}

// A logit and what its gradient needs.
struct Logit {
  double value, slope, cosine, query_length, key_length;
};

inline Logit logit_of(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const float* q = row_of(p.q, b, h, i);
  const float* k = row_of(p.k, b, h / (p.query_heads / p.key_heads), j);
  double dot = 0.0, qq = 0.0, kk = 0.0, x = 0.0;
  for (int64_t e = 0; e < p.width; ++e) {
    dot += double(q[e]) * k[e];
    qq += double(q[e]) * q[e];
    kk += double(k[e]) * k[e];
  }
  Logit s{0.0, 1.0, 0.0, std::fmax(std::sqrt(qq), 1e-12), std::fmax(std::sqrt(kk), 1e-12)};
  s.cosine = dot / (s.query_length * s.key_length);
  x = p.temperature == nullptr ? p.scale * dot : p.scale * double(p.temperature[h * p.temperature_stride]) * s.cosine;
  if (p.softcap > 0.0f) {
    const double t = std::tanh(x / p.softcap);
    x = p.softcap * t;
    s.slope = 1.0 - t * t;
  }
  if (p.bias.data != nullptr) x += row_of(p.bias, b, h, i)[j];
  if (p.relative != nullptr) x += p.relative[h * p.relative_head_stride + relative_index(p, i, j)];
  s.value = x;
  return s;
}

// Contiguous, in the extents of vlm/attention.hpp; the gradients of what the call leaves out are empty.
struct AttentionAnswer {
  std::vector<double> out, lse, dq, dk, dv, dbias, drelative, dtemperature;
};

// Of the call, its problem, upstream gradients, and extents of the gradients are read; not its results.
inline AttentionAnswer attention_oracle(const AttentionBackward& call) {
  const AttentionProblem& p = call.problem;
  AttentionAnswer o;
  const int64_t rows = p.batch * p.query_heads * p.queries, key_rows = p.batch * p.key_heads * p.keys;
  o.out.assign(rows * p.value_width, 0.0);
  o.lse.assign(rows, -INFINITY);
  o.dq.assign(rows * p.width, 0.0);
  o.dk.assign(key_rows * p.width, 0.0);
  o.dv.assign(key_rows * p.value_width, 0.0);
  if (call.dbias != nullptr) o.dbias.assign(call.bias_batch * call.bias_heads * call.bias_rows * p.keys, 0.0);
  if (call.drelative != nullptr)
    o.drelative.assign((p.relative_head_stride == 0 ? 1 : p.query_heads) * relative_length(p), 0.0);
  if (call.dtemperature != nullptr) o.dtemperature.assign(p.temperature_stride == 0 ? 1 : p.query_heads, 0.0);
  std::vector<Logit> s(p.keys);
  std::vector<uint8_t> is(p.keys);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.query_heads; ++h)
      for (int64_t i = 0; i < p.queries; ++i) {
        const int64_t g = h / (p.query_heads / p.key_heads), row = (b * p.query_heads + h) * p.queries + i;
        double top = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j < p.keys; ++j) {
          is[j] = allowed(p, b, h, i, j);
          if (!is[j]) continue;
          s[j] = logit_of(p, b, h, i, j);
          top = std::fmax(top, s[j].value);
        }
        if (top == -INFINITY) continue;
        for (int64_t j = 0; j < p.keys; ++j)
          if (is[j]) sum += std::exp(s[j].value - top);
        o.lse[row] = top + std::log(sum);
        double* out = o.out.data() + row * p.value_width;
        const auto weight = [&](int64_t j) {  // of the value, over its probability
          return p.drop_below == 0 ? 1.0 : survives(p, b, h, i, j) ? 1.0 / p.keep_share : 0.0;
        };
        for (int64_t j = 0; j < p.keys; ++j) {
          const double share = is[j] ? std::exp(s[j].value - o.lse[row]) * weight(j) : 0.0;
          if (share == 0.0) continue;
          for (int64_t e = 0; e < p.value_width; ++e) out[e] += share * row_of(p.v, b, g, j)[e];
        }
        if (call.dout.data == nullptr && p.value_width > 0) continue;
        const float* dout = row_of(call.dout, b, h, i);
        double delta = call.dlse == nullptr ? 0.0 : -double(call.dlse[row]);
        for (int64_t e = 0; e < p.value_width; ++e) delta += double(dout[e]) * out[e];
        for (int64_t j = 0; j < p.keys; ++j) {
          const double probability = is[j] ? std::exp(s[j].value - o.lse[row]) : 0.0;
          if (probability == 0.0) continue;
          const int64_t key_row = (b * p.key_heads + g) * p.keys + j;
          double dp = 0.0;
          for (int64_t e = 0; e < p.value_width; ++e) {
            dp += weight(j) * dout[e] * row_of(p.v, b, g, j)[e];
            o.dv[key_row * p.value_width + e] += probability * weight(j) * dout[e];
          }
          const double ds = probability * (dp - delta), dx = ds * s[j].slope * p.scale;
          if (!o.dbias.empty())
            o.dbias[(((call.bias_batch == 1 ? 0 : b) * call.bias_heads + (call.bias_heads == 1 ? 0 : h)) *
                         call.bias_rows + (call.bias_rows == 1 ? 0 : i)) * p.keys + j] += ds;
          if (!o.drelative.empty())
            o.drelative[(p.relative_head_stride == 0 ? 0 : h) * relative_length(p) + relative_index(p, i, j)] += ds;
          if (!o.dtemperature.empty()) o.dtemperature[p.temperature_stride == 0 ? 0 : h] += dx * s[j].cosine;
          const float *q = row_of(p.q, b, h, i), *k = row_of(p.k, b, g, j);
          for (int64_t e = 0; e < p.width; ++e) {
            double *dq = o.dq.data() + row * p.width + e, *dk = o.dk.data() + key_row * p.width + e;
            if (p.temperature == nullptr) {
              *dq += dx * k[e];
              *dk += dx * q[e];
              continue;
            }
            const double up = dx * p.temperature[h * p.temperature_stride];
            const double unit_q = q[e] / s[j].query_length, unit_k = k[e] / s[j].key_length;
            *dq += up * (unit_k - unit_q * s[j].cosine) / s[j].query_length;
            *dk += up * (unit_q - unit_k * s[j].cosine) / s[j].key_length;
          }
        }
      }
  return o;
}

}  // namespace vlm::test
