// Statistics of attention of drawn shapes, strides and mask programs, and the merge of drawn parts, against the float64
// oracles; one to four threads bit for bit; calls that do not fit are refused.
#include "attention_oracle.hpp"
#include "masks.hpp"
#include "vlm/attention_statistics.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

void statistics(Bytes& in, Draw& draw, int threads) {
  AttentionProblem p{};
  p.batch = in.size(3), p.key_heads = in.between(1, 3), p.query_heads = p.key_heads * in.between(0, 3);
  p.queries = in.size(in.one_in(8) ? 240 : 60), p.keys = in.size(in.one_in(8) ? 560 : 80), p.width = in.size(30);
  Field q(in, p.batch, p.query_heads, p.queries, p.width), k(in, p.batch, p.key_heads, p.keys, p.width);
  q.fill(draw), k.fill(draw);
  p.q = q.view<Heads>(), p.k = k.view<Heads>();
  p.scale = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(p.width, 1)));
  Masks masks;
  masks.draw(in, draw, p.batch, p.query_heads, p.queries, p.keys);
  p.atoms = masks.atoms.data(), p.atom_count = static_cast<int64_t>(masks.atoms.size());
  p.causal = in.one_in(3), p.causal_offset = masks.offset(in, p.queries, p.keys);
  std::vector<uint8_t> key_mask(p.batch * p.keys);
  for (uint8_t& x : key_mask) x = static_cast<uint8_t>(draw.below(3));
  if (in.one_in(3) && !key_mask.empty()) {
    p.key_mask = key_mask.data(), p.key_mask_stride = p.keys;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.key_heads; ++h)
        for (int64_t j = 0; j < p.keys; ++j)
          if (key_mask[b * p.keys + j] == 0) std::fill_n(k.data.data() + k.at(b, h, j), p.width, NAN);
  }
  if (in.one_in(4)) p.softcap = 0.5f + static_cast<float>(in.below(40));
  std::vector<float> relative = draw.numbers(p.queries + p.keys > 0 ? p.queries + p.keys - 1 : 0);
  if (in.one_in(4) && !relative.empty()) p.relative = relative.data();
  const int64_t rows = p.batch * p.query_heads * p.queries, count = in.below(6);
  std::vector<int64_t> chosen(p.batch * count);
  for (int64_t& row : chosen) row = draw.below(p.queries + 1) - 1;
  std::vector<float> weights = draw.numbers(rows);
  for (float& w : weights)
    if (draw.below(4) == 0) w = 0.0f;
  const float* weighted = in.one_in(2) ? weights.data() : nullptr;
  about = words("statistics B", p.batch, "Hq", p.query_heads, "Hk", p.key_heads, "N", p.queries, "M", p.keys, "D",
                p.width, "causal", p.causal, "offset", p.causal_offset, "key mask", p.key_mask != nullptr, "cap",
                p.softcap, "relative", p.relative != nullptr, "rows", count) +
          masks.text();
  const bool wrong = in.one_in(10);
  if (wrong || !masks.fits) {
    if (masks.fits) switch (in.below(4)) {
        case 0: p.key_heads = 0; break;
        case 1: p.softcap = -1.0f; break;
        case 2:
          p.relative = relative.empty() ? weights.data() : relative.data();
          if (p.relative == nullptr) return;
          p.grid_columns = 2, p.grid_rows = p.queries / 2 + 1;
          break;
        default: masks.spoil(in, p.queries), p.atoms = masks.atoms.data(), p.atom_count = int64_t(masks.atoms.size());
      }
    require_refused([&] { attention_column_sums({p, nullptr, nullptr, nullptr}, threads); }, "column sums");
    require_refused([&] { attention_row_statistics({p, nullptr, nullptr, nullptr}, threads); }, "row statistics");
    require_refused([&] { attention_rows({p, 0, nullptr, nullptr}, threads); }, "attention rows");
    return;
  }
  if (in.one_in(16) && p.batch * count > 0) {
    chosen[draw.below(p.batch * count)] = in.one_in(2) ? p.queries + in.below(3) : -2 - in.below(3);
    require_refused([&] { attention_rows({p, count, chosen.data(), nullptr}, threads); }, "attention rows: a row");
    return;
  }
  AttentionBackward call{};
  call.problem = p;
  const test::AttentionAnswer o = test::attention_oracle(call);
  std::vector<double> entropy(rows, 0.0), sums(p.batch * p.query_heads * p.keys, 0.0);
  std::vector<double> some(p.batch * p.query_heads * count * p.keys, 0.0);
  std::vector<double> logits(p.keys);
  struct Results {
    std::vector<float> lse, entropy, sums, some;
    std::vector<int64_t> best;
  };
  const auto run = [&](int n) {
    Results r{std::vector<float>(rows, untouched), std::vector<float>(rows, untouched),
              std::vector<float>(sums.size(), untouched), std::vector<float>(some.size(), untouched),
              std::vector<int64_t>(rows, -777)};
    attention_row_statistics({p, r.lse.data(), r.entropy.data(), r.best.data()}, n);
    attention_column_sums({p, r.lse.data(), weighted, r.sums.data()}, n);
    attention_rows({p, count, chosen.data(), r.some.data()}, n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.lse, other.lse) && same_bits(r.entropy, other.entropy) && same_bits(r.sums, other.sums) &&
              same_bits(r.some, other.some) && r.best == other.best,
          "statistics: bits differ with threads");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % p.queries, head = row / p.queries, b = head / p.query_heads, h = head % p.query_heads;
    double top = -INFINITY;
    for (int64_t j = 0; j < p.keys; ++j) {
      logits[j] = test::allowed(p, b, h, i, j) ? test::logit_of(p, b, h, i, j).value : -INFINITY;
      top = std::fmax(top, logits[j]);
      const double share = logits[j] == -INFINITY ? 0.0 : std::exp(logits[j] - o.lse[row]);
      if (share > 0.0) entropy[row] -= share * (logits[j] - o.lse[row]);
      sums[head * p.keys + j] += share * (weighted == nullptr ? 1.0 : weights[row]);
      for (int64_t s = 0; s < count; ++s)
        if (chosen[b * count + s] == i) some[(head * count + s) * p.keys + j] = share;
    }
    require(top == -INFINITY ? r.best[row] == -1
                             : r.best[row] >= 0 && r.best[row] < p.keys && logits[r.best[row]] >= top - 1e-4,
            "statistics: best");
  }
  require_close(r.lse, o.lse, 1e-5, "statistics lse");
  require_close(r.entropy, entropy, 2e-5, "statistics entropy");
  require_close(r.sums, sums, 2e-5, "statistics column sums");
  require_close(r.some, some, 1e-5, "statistics rows");
}

void merge(Bytes& in, Draw& draw, int threads) {
  AttentionMerge c{};
  c.batch = in.size(3), c.heads = in.size(4), c.length = in.size(60), c.width = in.size(40), c.parts = 1 + in.below(5);
  const int64_t rows = c.batch * c.heads * c.length;
  std::vector<Field> fields, gradient_shapes;
  std::vector<std::vector<float>> lses;
  for (int64_t part = 0; part < c.parts; ++part) {
    fields.emplace_back(in, c.batch, c.heads, c.length, c.width);
    gradient_shapes.emplace_back(in, c.batch, c.heads, c.length, c.width);
    fields.back().fill(draw);
    lses.push_back(draw.numbers(rows));
    for (int64_t row = 0; row < rows; ++row)
      if (draw.below(4) == 0) {
        lses.back()[row] = -INFINITY;
        std::fill_n(fields.back().data.data() +
                        fields.back().at(row / c.length / c.heads, row / c.length % c.heads, row % c.length),
                    c.width, NAN);
      }
  }
  const Field shape(in, c.batch, c.heads, c.length, c.width);
  Field dout(in, c.batch, c.heads, c.length, c.width);
  dout.fill(draw);
  const std::vector<float> dlse = draw.numbers(rows);
  about = words("merge B", c.batch, "H", c.heads, "N", c.length, "V", c.width, "parts", c.parts);
  std::vector<Heads> outs;
  std::vector<const float*> given;
  for (int64_t part = 0; part < c.parts; ++part)
    outs.push_back(fields[part].view<Heads>()), given.push_back(lses[part].data());
  c.outs = outs.data(), c.lses = given.data();
  AttentionMergeBackward back{c.batch, c.heads, c.length,           c.width,     c.parts, c.outs, c.lses,
                              {},      nullptr, dout.view<Heads>(), dlse.data(), nullptr, nullptr};
  if (in.one_in(12)) {
    int64_t* of[] = {&c.batch, &c.heads, &c.length, &c.width, &c.parts};
    int64_t* of_back[] = {&back.batch, &back.heads, &back.length, &back.width, &back.parts};
    const int64_t which = in.below(5), bad = in.one_in(2) ? INT64_MIN : -1 - in.below(9);
    *of[which] = *of_back[which] = bad;
    require_refused([&] { attention_merge(c, threads); }, "merge");
    require_refused([&] { attention_merge_backward(back, threads); }, "merge backward");
    return;
  }
  struct Results {
    std::vector<float> lse;
    std::vector<std::vector<float>> values;  // out, then for each part dout and dlse
  };
  const auto run = [&](int n) {
    Results r{std::vector<float>(rows, untouched), {}};
    Field out = shape;
    c.out = out.view<MutableHeads>(), c.lse = r.lse.data();
    attention_merge(c, n);
    std::vector<Field> gradients = gradient_shapes;
    std::vector<std::vector<float>> dlses(c.parts, std::vector<float>(rows, untouched));
    std::vector<MutableHeads> wanted;
    std::vector<float*> wanted_lse;
    for (int64_t part = 0; part < c.parts; ++part)
      wanted.push_back(gradients[part].view<MutableHeads>()), wanted_lse.push_back(dlses[part].data());
    back.out = out.view<Heads>(), back.lse = r.lse.data(), back.douts = wanted.data(), back.dlses = wanted_lse.data();
    attention_merge_backward(back, n);
    r.values.push_back(out.written("merge out"));
    for (int64_t part = 0; part < c.parts; ++part)
      r.values.push_back(gradients[part].written("merge dout")), r.values.push_back(dlses[part]);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.lse, other.lse), "merge: bits of lse differ with threads");
  for (std::size_t i = 0; i < r.values.size(); ++i)
    require(same_bits(r.values[i], other.values[i]), "merge: bits differ with threads");
  std::vector<std::vector<double>> want(2 * c.parts + 1);
  std::vector<double> lse(rows, -INFINITY);
  for (std::size_t i = 0; i < want.size(); ++i) want[i].assign(r.values[i].size(), 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / c.length / c.heads, h = row / c.length % c.heads, n = row % c.length;
    double total = 0.0;
    for (int64_t part = 0; part < c.parts; ++part) total += std::exp(double(lses[part][row]));
    if (total == 0.0) continue;
    lse[row] = std::log(total);
    const auto weight = [&](int64_t part) { return std::exp(lses[part][row] - lse[row]); };
    double* out = want[0].data() + row * c.width;
    for (int64_t part = 0; part < c.parts; ++part)
      for (int64_t e = 0; e < c.width && weight(part) > 0.0; ++e)
        out[e] += weight(part) * fields[part].data[fields[part].at(b, h, n) + e];
    for (int64_t part = 0; part < c.parts; ++part) {
      if (weight(part) == 0.0) continue;
      double along = dlse[row];
      for (int64_t e = 0; e < c.width; ++e) {
        const double up = dout.data[dout.at(b, h, n) + e];
        want[1 + 2 * part][row * c.width + e] = weight(part) * up;
        along += up * (fields[part].data[fields[part].at(b, h, n) + e] - out[e]);
      }
      want[2 + 2 * part][row] = weight(part) * along;
    }
  }
  require_close(r.lse, lse, 1e-5, "merge lse");
  for (std::size_t i = 0; i < want.size(); ++i) require_close(r.values[i], want[i], 2e-5, "merge " + std::to_string(i));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  in.one_in(3) ? merge(in, draw, threads) : statistics(in, draw, threads);
  return 0;
}
