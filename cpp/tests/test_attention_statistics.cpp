// Statistics of attention rows and columns, and the merge of parts, against a float64 oracle that holds the matrix.
#include <limits>
#include <stdexcept>

#include "attention_oracle.hpp"
#include "check.hpp"
#include "vlm/attention_statistics.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t batch, query_heads, key_heads, queries, keys, width;
  bool causal;
  int64_t offset;
  bool mask, bias;
  bool program = false;  // a window, a mask of each head, a bias of each head by position, a soft cap
  std::string name() const {
    return "B" + std::to_string(batch) + " H" + std::to_string(query_heads) + "/" + std::to_string(key_heads) + " N" +
           std::to_string(queries) + " M" + std::to_string(keys) + " D" + std::to_string(width) + " causal" +
           std::to_string(causal) + " mask" + std::to_string(mask) + " bias" + std::to_string(bias) +
           " program" + std::to_string(program);
  }
};

constexpr int64_t gap = 3, window = 90;
constexpr float cap = 1.5f;

// q and k lie in [B, N, H, D] order with a gap after each row; masked keys and queries of weight 0 hold NaN.
struct Tensors {
  Case c;
  float scale;
  std::vector<float> q, k, bias, weights;
  std::vector<uint8_t> mask, allow;
  std::vector<float> relative;
  std::vector<MaskAtom> atoms;
  std::vector<int64_t> rows;
  std::vector<float> lse, entropy, sums, chosen;
  std::vector<int64_t> best;

  Tensors(const Case& c_, uint64_t seed) : c(c_), scale(1.0f / std::sqrt(float(c_.width))) {
    Numbers numbers(seed);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    q = numbers.normal(c.batch * c.queries * c.query_heads * (c.width + gap));
    k = numbers.normal(c.batch * c.keys * c.key_heads * (c.width + gap));
    weights = numbers.normal(c.batch * c.query_heads * c.queries);
    if (c.bias) bias = numbers.normal(c.queries * c.keys);
    if (c.program) {
      relative = numbers.normal(c.query_heads * (c.queries + c.keys - 1));
      allow.resize(c.query_heads * c.queries * c.keys);
      for (uint8_t& x : allow) x = numbers.below(8) > 0;
      atoms.push_back({AtomKind::local_band, {c.keys - c.queries, window, window, 0}, nullptr, 0, 0, 0, nullptr, 0, 0});
      atoms.push_back({AtomKind::dense, {0, 0, 0, 0}, allow.data(), 0, c.queries * c.keys, c.keys, nullptr, 0, 0});
    }
    if (c.mask) {
      mask.resize(c.batch * c.keys);
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t j = 0; j < c.keys; ++j) {
          mask[b * c.keys + j] = numbers.below(3) > 0;
          for (int64_t h = 0; h < c.key_heads && !mask[b * c.keys + j]; ++h)
            for (int64_t e = 0; e < c.width; ++e) k[key_at(b, h, j) + e] = nan;
        }
    }
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t r = 0; r < 3; ++r) rows.push_back(r == 1 || c.queries == 0 ? -1 : r * (c.queries - 1) / 2);
    const int64_t n = c.batch * c.query_heads * c.queries;
    lse.resize(n);
    entropy.resize(n);
    best.resize(n);
    sums.resize(c.batch * c.query_heads * c.keys);
    chosen.resize(c.batch * c.query_heads * 3 * c.keys);
  }
  int64_t query_at(int64_t b, int64_t h, int64_t i) const {
    return ((b * c.queries + i) * c.query_heads + h) * (c.width + gap);
  }
  int64_t key_at(int64_t b, int64_t h, int64_t j) const {
    return ((b * c.keys + j) * c.key_heads + h) * (c.width + gap);
  }
  AttentionProblem problem() const {
    AttentionProblem p{};
    p.batch = c.batch;
    p.query_heads = c.query_heads;
    p.key_heads = c.key_heads;
    p.queries = c.queries;
    p.keys = c.keys;
    p.width = c.width;
    const int64_t row = c.width + gap;
    p.q = {q.data(), c.queries * c.query_heads * row, row, c.query_heads * row};
    p.k = {k.data(), c.keys * c.key_heads * row, row, c.key_heads * row};
    p.scale = scale;
    p.causal = c.causal;
    p.causal_offset = c.offset;
    p.key_mask = c.mask ? mask.data() : nullptr;
    p.key_mask_stride = c.keys;
    if (c.bias) p.bias = {bias.data(), 0, 0, c.keys};
    if (!c.program) return p;
    p.atoms = atoms.data();
    p.atom_count = static_cast<int64_t>(atoms.size());
    p.softcap = cap;
    p.relative = relative.data();
    p.relative_head_stride = c.queries + c.keys - 1;
    return p;
  }
  void run(int threads) {
    attention_row_statistics({problem(), lse.data(), entropy.data(), best.data()}, threads);
    attention_column_sums({problem(), lse.data(), weights.data(), sums.data()}, threads);
    attention_rows({problem(), 3, rows.data(), chosen.data()}, threads);
  }
};

void compare(const Case& c) {
  Tensors t(c, 7);
  t.run(1);
  std::vector<double> lse, entropy, sums(t.sums.size()), chosen(t.chosen.size());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.query_heads; ++h)
      for (int64_t i = 0; i < c.queries; ++i) {
        std::vector<double> s(c.keys, -INFINITY);
        double top = -INFINITY, total = 0.0, spread = 0.0;
        for (int64_t j = 0; j < c.keys; ++j) {
          if ((c.causal && j > i + c.offset) || (c.mask && !t.mask[b * c.keys + j])) continue;
          if (c.program && std::abs(i + c.keys - c.queries - j) > window) continue;
          if (c.program && !t.allow[(h * c.queries + i) * c.keys + j]) continue;
          double dot = 0.0;
          for (int64_t e = 0; e < c.width; ++e)
            dot += double(t.q[t.query_at(b, h, i) + e]) * t.k[t.key_at(b, h / (c.query_heads / c.key_heads), j) + e];
          dot *= t.scale;
          if (c.program)
            dot = cap * std::tanh(dot / cap) + t.relative[h * (c.queries + c.keys - 1) + c.queries - 1 - i + j];
          s[j] = dot + (c.bias ? t.bias[i * c.keys + j] : 0.0);
          top = std::fmax(top, s[j]);
        }
        for (int64_t j = 0; j < c.keys; ++j) total += top == -INFINITY ? 0.0 : std::exp(s[j] - top);
        lse.push_back(top == -INFINITY ? top : top + std::log(total));
        const int64_t head = b * c.query_heads + h, best = t.best[head * c.queries + i];
        check(top == -INFINITY ? best == -1 : best >= 0 && s[best] >= top - 1e-5, c.name() + " best");
        for (int64_t j = 0; j < c.keys; ++j) {
          if (s[j] == -INFINITY) continue;
          const double p = std::exp(s[j] - lse.back());
          spread -= p * (s[j] - lse.back());
          sums[head * c.keys + j] += t.weights[head * c.queries + i] * p;
          for (int64_t r = 0; r < 3; ++r)
            if (t.rows[b * 3 + r] == i) chosen[(head * 3 + r) * c.keys + j] = p;
        }
        entropy.push_back(spread);
      }
  check_close(t.lse, lse, 2e-6, c.name() + " lse");
  check_close(t.entropy, entropy, 2e-6, c.name() + " entropy");
  check_close(t.sums, sums, 5e-6, c.name() + " column sums");
  check_close(t.chosen, chosen, 2e-6, c.name() + " rows");
  for (int threads : {2, 5}) {
    Tensors other(c, 7);
    other.run(threads);
    check(same_bits(t.lse, other.lse) && same_bits(t.entropy, other.entropy) && t.best == other.best &&
              same_bits(t.sums, other.sums) && same_bits(t.chosen, other.chosen),
          c.name() + ": bits differ with " + std::to_string(threads) + " threads");
  }
  // A query of weight 0 is not read.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.query_heads; ++h)
      for (int64_t i = 0; i < c.queries; i += 2) {
        t.weights[(b * c.query_heads + h) * c.queries + i] = 0.0f;
        for (int64_t e = 0; e < c.width; ++e) t.q[t.query_at(b, h, i) + e] = nan;
      }
  attention_column_sums({t.problem(), t.lse.data(), t.weights.data(), t.sums.data()}, 1);
  for (float x : t.sums) check(std::isfinite(x), c.name() + ": a query of weight 0 was read");
}

// Chosen rows under a mask and a relative bias of every head are those of the whole matrix.
void rows_of_heads_that_differ() {
  Tensors t({1, 6, 2, 9, 40, 8, false, 0, false, false}, 7);
  Numbers numbers(5);
  std::vector<uint8_t> allow(6 * 9 * 40);
  for (uint8_t& x : allow) x = numbers.below(3) > 0;
  const std::vector<float> relative = numbers.normal(6 * 48);
  const MaskAtom dense{AtomKind::dense, {0, 0, 0, 0}, allow.data(), 6 * 9 * 40, 9 * 40, 40, nullptr, 0, 0};
  AttentionProblem p = t.problem();
  p.atoms = &dense, p.atom_count = 1;
  p.relative = relative.data(), p.relative_head_stride = 48;
  const std::vector<int64_t> rows{3, 8};
  std::vector<float> got(6 * 2 * 40), lse(6 * 9);
  attention_rows({p, 2, rows.data(), got.data()}, 1);
  attention_row_statistics({p, lse.data(), nullptr, nullptr}, 1);
  std::vector<double> want(got.size(), 0.0);
  for (int64_t h = 0; h < 6; ++h)
    for (int64_t r = 0; r < 2; ++r)
      for (int64_t j = 0; j < 40; ++j)
        if (allowed(p, 0, h, rows[r], j))
          want[(h * 2 + r) * 40 + j] = std::exp(logit_of(p, 0, h, rows[r], j).value - lse[h * 9 + rows[r]]);
  check_close(got, want, 2e-6, "rows of heads that differ");
}

void merge(int64_t parts, int64_t length, int64_t width) {
  const std::string name = "merge P" + std::to_string(parts) + " N" + std::to_string(length) + " V" +
                           std::to_string(width);
  const int64_t batch = 2, heads = 3, rows = batch * heads * length;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Numbers numbers(3);
  std::vector<std::vector<float>> outs, lses;
  for (int64_t p = 0; p < parts; ++p) {
    outs.push_back(numbers.normal(rows * width));
    lses.push_back(numbers.normal(rows, 4.0f));
    for (int64_t r = 0; r < rows; ++r)
      if (numbers.below(4) == 0 || r == 1) {
        lses[p][r] = -INFINITY;
        for (int64_t e = 0; e < width; ++e) outs[p][r * width + e] = nan;
      }
  }
  const std::vector<float> dout = numbers.normal(rows * width), dlse = numbers.normal(rows);
  std::vector<double> out(rows * width), lse(rows, -INFINITY);
  std::vector<std::vector<double>> douts(parts, out), dlses(parts, std::vector<double>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0.0;
    for (int64_t p = 0; p < parts; ++p) total += std::exp(double(lses[p][r]));
    if (total == 0.0) continue;
    lse[r] = std::log(total);
    for (int64_t p = 0; p < parts; ++p)
      for (int64_t e = 0; e < width && !std::isinf(lses[p][r]); ++e)
        out[r * width + e] += std::exp(lses[p][r] - lse[r]) * outs[p][r * width + e];
    for (int64_t p = 0; p < parts; ++p) {
      if (std::isinf(lses[p][r])) continue;
      const double w = std::exp(lses[p][r] - lse[r]);
      dlses[p][r] = w * dlse[r];
      for (int64_t e = 0; e < width; ++e) {
        douts[p][r * width + e] = w * dout[r * width + e];
        dlses[p][r] += w * dout[r * width + e] * (outs[p][r * width + e] - out[r * width + e]);
      }
    }
  }
  std::vector<float> first;
  for (int threads : {1, 2, 5}) {
    std::vector<float> o(rows * width), l(rows);
    std::vector<std::vector<float>> po(parts, o), pl(parts, l);
    std::vector<Heads> views;
    std::vector<MutableHeads> gradients;
    std::vector<const float*> given;
    std::vector<float*> wanted;
    for (int64_t p = 0; p < parts; ++p) {
      views.push_back({outs[p].data(), heads * length * width, length * width, width});
      gradients.push_back({po[p].data(), heads * length * width, length * width, width});
      given.push_back(lses[p].data());
      wanted.push_back(pl[p].data());
    }
    attention_merge({batch, heads, length, width, parts, views.data(), given.data(),
                     {o.data(), heads * length * width, length * width, width}, l.data()},
                    threads);
    const Heads whole{o.data(), heads * length * width, length * width, width};
    const Heads upstream{dout.data(), heads * length * width, length * width, width};
    attention_merge_backward({batch, heads, length, width, parts, views.data(), given.data(), whole, l.data(), upstream,
                              dlse.data(), gradients.data(), wanted.data()},
                             threads);
    std::vector<float> all = o;
    all.insert(all.end(), l.begin(), l.end());
    for (int64_t p = 0; p < parts; ++p) {
      check_close(po[p], douts[p], 2e-6, name + " dout");
      check_close(pl[p], dlses[p], 1e-5, name + " dlse");
      all.insert(all.end(), pl[p].begin(), pl[p].end());
    }
    check_close(o, out, 2e-6, name + " out");
    check_close(l, lse, 2e-6, name + " lse");
    if (threads == 1) first = all;
    check(same_bits(first, all), name + ": bits differ");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    compare({1, 1, 1, 1, 1, 1, false, 0, false, false});
    compare({2, 1, 1, 0, 3, 4, false, 0, false, false});
    compare({2, 1, 1, 3, 0, 4, false, 0, false, false});
    compare({0, 1, 1, 3, 3, 4, false, 0, false, false});
    for (int64_t n : {5, 6, 7, 13, 14, 15, 95, 96, 97, 223, 224, 225})
      compare({1, 2, 1, n, n + 1, 17, n % 2 == 0, n % 3 == 0 ? 1 : 0, n % 2 == 1, n % 3 == 1});
    for (int64_t m : {31, 32, 33, 255, 256, 257, 521}) compare({1, 2, 2, 29, m, 16, m % 2 == 1, m - 29, true, false});
    for (bool mask : {false, true})
      for (bool bias : {false, true})
        for (bool causal : {false, true}) compare({2, 4, 2, 59, 261, 16, causal, 202, mask, bias});
    compare({1, 2, 2, 130, 70, 32, true, -60, false, false});  // empty rows
    for (bool mask : {false, true})
      for (bool bias : {false, true}) compare({2, 4, 2, 59, 261, 16, mask, 202, mask, bias, true});
    compare({1, 2, 1, 97, 300, 17, false, 0, false, false, true});
    compare({2, 8, 8, 300, 300, 32, true, 0, true, false});    // several threads at work
    for (int64_t parts : {1, 2, 5})
      for (int64_t width : {0, 1, 15, 16, 33}) merge(parts, 7, width);
    merge(3, 0, 8);
    merge(3, 900, 40);
    rows_of_heads_that_differ();
    const float one[1] = {1.0f};
    const auto refused = [&](const char* what, auto spoil) {
      AttentionProblem p{};
      p.query_heads = p.key_heads = 1;
      spoil(p);
      try {
        attention_column_sums({p, nullptr, nullptr, nullptr}, 1);
        check(false, std::string(what) + " is not refused");
      } catch (const std::invalid_argument&) {
      }
    };
    refused("heads that do not divide", [](AttentionProblem& p) { p.query_heads = 3, p.key_heads = 2; });
    refused("a cosine product", [&](AttentionProblem& p) { p.temperature = one; });
    refused("a grid that does not fit", [&](AttentionProblem& p) {
      p.relative = one;
      p.grid_rows = p.grid_columns = 2;
    });
  });
}
