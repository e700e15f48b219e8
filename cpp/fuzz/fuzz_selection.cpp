// Hierarchical selection of key blocks and attention over lists of them. Selection works on small whole numbers, whose
// products float32 holds exactly, so it must choose what the definition chooses, ties included; attention is compared
// with float64. One to four threads bit for bit; calls that do not fit are refused.
#include <algorithm>

#include "input.hpp"
#include "vlm/selection.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

SelectionProblem problem(Bytes& in) {
  SelectionProblem p{};
  p.batch = in.size(3), p.key_heads = in.between(1, 2), p.query_heads = p.key_heads * in.between(0, 2);
  p.queries = in.size(70), p.keys = in.size(in.one_in(4) ? 600 : 120), p.width = in.size(24);
  p.block_q = in.one_in(12) ? 256 : in.between(1, 20),
  p.block_k = in.one_in(12) ? 200 + in.below(57) : in.between(1, 20);
  const int64_t offsets[] = {p.keys - p.queries, 0, 3, -7, -p.queries - 1, INT64_MAX, INT64_MIN};
  p.offset = in.among(offsets);
  return p;
}

void spoil(Bytes& in, SelectionProblem& p) {
  int64_t* sizes[] = {&p.batch, &p.query_heads, &p.key_heads, &p.queries, &p.keys, &p.width};
  switch (in.below(5)) {
    case 0: p.key_heads = 0; return;
    case 1: p.query_heads = 3, p.key_heads = 2; return;
    case 2: (in.one_in(2) ? p.block_q : p.block_k) = in.one_in(2) ? -in.below(3) : 257 + in.below(3); return;
    case 3: (in.one_in(2) ? p.queries : p.keys) = int64_t(INT32_MAX) + 1; return;
    default: *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
  }
}

int64_t rounded_up(int64_t n, int64_t block) { return (n + block - 1) / block; }

// A sum that stays at the ends of int64.
int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? (b > 0 ? INT64_MAX : INT64_MIN) : sum;
}

struct Interval {
  int64_t first, end;
  double score;
};

struct Chosen {
  std::vector<int32_t> blocks;
  int64_t evaluations = 0;
};

// The definition, for one block of queries.
Chosen choose(const HierarchicalSelection& c, int64_t b, int64_t h, int64_t block) {
  const SelectionProblem& p = c.problem;
  const int64_t i0 = block * p.block_q, i1 = std::min(p.queries, i0 + p.block_q);
  const auto sees = [&](int64_t i, int64_t j) { return j <= plus(i, p.offset); };
  Chosen chosen;
  std::vector<int64_t> between;
  for (int64_t k = 0; k < rounded_up(p.keys, p.block_k); ++k) {
    const int64_t j0 = k * p.block_k, j1 = j0 + p.block_k;
    if (!sees(i1 - 1, j0)) continue;
    bool near = j0 < c.sinks;
    const int64_t from = plus(plus(i0, p.offset), c.window == 0 ? 0 : 1 - c.window);
    if (c.window > 0) near = near || j1 - 1 >= from;
    if (near) chosen.blocks.push_back(static_cast<int32_t>(k));
    else between.push_back(k);
  }
  const int64_t n = static_cast<int64_t>(between.size()), m = c.budget;
  if (n <= m) {
    for (int64_t k : between) chosen.blocks.push_back(static_cast<int32_t>(k));
  } else if (m > 0) {
    std::vector<Interval> list;
    for (int64_t i = 0; i < m; ++i) list.push_back({i * n / m, (i + 1) * n / m, 0.0});
    const auto longer = [](const Interval& x) { return x.end - x.first > 1; };
    while (std::any_of(list.begin(), list.end(), longer)) {
      std::vector<Interval> halves;
      for (const Interval& x : list) {
        const int64_t middle = x.first + (x.end - x.first) / 2;
        if (longer(x)) halves.push_back({x.first, middle, 0.0}), halves.push_back({middle, x.end, 0.0});
        else halves.push_back(x);
      }
      for (Interval& x : halves) {
        const int64_t k = between[x.first + (c.representative == Representative::center ? (x.end - x.first) / 2 : 0)];
        x.score = -INFINITY;
        for (int64_t i = i0; i < i1; i += std::min(c.row_step, p.block_q))
          for (int64_t j = k * p.block_k; j < std::min(p.keys, (k + 1) * p.block_k); ++j) {
            if (!sees(i, j)) continue;
            double dot = 0.0;
            for (int64_t e = 0; e < p.width; ++e)
              dot += double(p.q.data[b * p.q.batch_stride + h * p.q.head_stride + i * p.q.row_stride + e]) *
                     p.k.data[b * p.k.batch_stride + h / (p.query_heads / p.key_heads) * p.k.head_stride +
                              j * p.k.row_stride + e];
            x.score = std::fmax(x.score, dot);
          }
      }
      chosen.evaluations += static_cast<int64_t>(halves.size());
      std::sort(halves.begin(), halves.end(), [](const Interval& x, const Interval& y) {
        return x.score > y.score || (x.score == y.score && x.first < y.first);
      });
      halves.resize(m);
      list = halves;
    }
    for (const Interval& x : list) chosen.blocks.push_back(static_cast<int32_t>(between[x.first]));
  }
  std::sort(chosen.blocks.begin(), chosen.blocks.end());
  return chosen;
}

void select(Bytes& in, Draw& draw, int threads) {
  HierarchicalSelection c{};
  SelectionProblem& p = c.problem;
  p = problem(in);
  Field q(in, p.batch, p.query_heads, p.queries, p.width), k(in, p.batch, p.key_heads, p.keys, p.width);
  const int64_t values = 1 + in.below(5);
  for (Field* field : {&q, &k}) {
    field->fill(draw);
    field->each([&](float* row) {
      for (int64_t e = 0; e < field->width; ++e) row[e] = static_cast<float>(draw.below(2 * values + 1) - values);
    });
  }
  p.q = q.view<Heads>(), p.k = k.view<Heads>();
  const int64_t blocks = rounded_up(p.keys, p.block_k);
  c.budget = in.one_in(8) ? INT64_MAX : in.below(9);
  c.window = in.one_in(8) ? INT64_MAX : in.one_in(2) ? 0 : in.below(60);
  c.sinks = in.one_in(8) ? INT64_MAX : in.one_in(2) ? 0 : in.below(40);
  c.row_step = in.one_in(8) ? INT64_MAX : in.between(1, 4);
  c.representative = static_cast<Representative>(in.below(2));
  c.capacity = blocks + in.below(3);
  if (in.one_in(3) && c.budget < 9 && c.window < 60 && c.sinks < 40)  // the least that is promised to do
    c.capacity =
        std::min(blocks, rounded_up(c.sinks, p.block_k) + rounded_up(c.window + p.block_q, p.block_k) + 1 + c.budget);
  about = words("select B", p.batch, "H", p.query_heads, "", p.key_heads, "N", p.queries, "M", p.keys, "D", p.width,
                "block q", p.block_q, "block k", p.block_k, "offset", p.offset, "budget", c.budget, "window", c.window,
                "sinks", c.sinks, "step", c.row_step, "center", int(c.representative), "capacity", c.capacity);
  if (in.one_in(10)) {
    switch (in.below(6)) {
      case 0: c.budget = in.one_in(2) ? INT64_MIN : -1; break;
      case 1: c.window = in.one_in(2) ? INT64_MIN : -1; break;
      case 2: c.sinks = in.one_in(2) ? INT64_MIN : -1; break;
      case 3: c.row_step = -in.below(2); break;
      case 4: c.representative = static_cast<Representative>(in.one_in(2) ? -1 : 2); break;
      default: spoil(in, p);
    }
    require_refused([&] { select_hierarchical(c, threads); }, "select hierarchical");
    return;
  }
  const int64_t lists = p.batch * p.query_heads * rounded_up(p.queries, p.block_q);
  std::vector<int32_t> indices(lists * c.capacity, 777), counts(lists, 777), again(lists * c.capacity, 777);
  std::vector<int64_t> evaluations(lists, 777);
  c.counts = counts.data(), c.evaluations = evaluations.data();
  c.indices = again.data();
  select_hierarchical(c, 1);
  c.indices = indices.data();
  select_hierarchical(c, threads);
  require(indices == again, "select hierarchical: another result with threads");
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t per_head = rounded_up(p.queries, p.block_q), head = list / per_head;
    Chosen want = choose(c, head / p.query_heads, head % p.query_heads, list % per_head);
    require(counts[list] == static_cast<int64_t>(want.blocks.size()), "select hierarchical: count");
    require(evaluations[list] == want.evaluations, "select hierarchical: representatives scored");
    want.blocks.resize(c.capacity, -1);
    require(std::equal(want.blocks.begin(), want.blocks.end(), indices.begin() + list * c.capacity),
            "select hierarchical: other blocks");
  }
}

void attend(Bytes& in, Draw& draw, int threads) {
  BlockSparseForward c{};
  SelectionProblem& p = c.problem;
  p = problem(in);
  c.value_width = in.size(40);
  Field q(in, p.batch, p.query_heads, p.queries, p.width), k(in, p.batch, p.key_heads, p.keys, p.width);
  Field v(in, p.batch, p.key_heads, p.keys, c.value_width);
  const Field shape(in, p.batch, p.query_heads, p.queries, c.value_width);
  for (Field* field : {&q, &k, &v}) field->fill(draw);
  p.q = q.view<Heads>(), p.k = k.view<Heads>(), c.v = v.view<Heads>();
  c.scale = 0.1f * static_cast<float>(in.below(12));
  const int64_t blocks = rounded_up(p.keys, p.block_k), per_head = rounded_up(p.queries, p.block_q);
  const int64_t lists = p.batch * p.query_heads * per_head, share = 1 + in.below(4);
  c.capacity = blocks + in.below(3);
  std::vector<int32_t> indices(lists * c.capacity, -1), counts(lists, 0);
  for (int64_t list = 0; list < lists; ++list)
    for (int64_t block = 0; block < blocks; ++block)
      if (draw.below(share) == 0) indices[list * c.capacity + counts[list]++] = static_cast<int32_t>(block);
  c.indices = indices.data(), c.counts = counts.data();
  about =
      words("attend B", p.batch, "H", p.query_heads, "", p.key_heads, "N", p.queries, "M", p.keys, "D", p.width, "V",
            c.value_width, "block q", p.block_q, "block k", p.block_k, "offset", p.offset, "capacity", c.capacity);
  if (in.one_in(10)) {
    if (in.one_in(2) && lists > 0) {
      const int64_t list = draw.below(lists);
      if (in.one_in(2) || c.capacity == 0) counts[list] = static_cast<int32_t>(in.one_in(2) ? c.capacity + 1 : -1);
      else
        counts[list] = std::max(counts[list], 1),
        indices[list * c.capacity] = static_cast<int32_t>(in.one_in(2) ? blocks : -1);
    } else if (in.one_in(3)) {
      (in.one_in(2) ? c.value_width : c.capacity) = -1;
    } else {
      spoil(in, p);
    }
    require_refused([&] { block_sparse_forward(c, threads); }, "block-sparse attention");
    return;
  }
  std::vector<float> lse(lists == 0 ? 0 : p.batch * p.query_heads * p.queries, untouched), other_lse = lse;
  const auto run = [&](int n, std::vector<float>& to) {
    Field out = shape;
    c.out = out.view<MutableHeads>(), c.lse = to.data();
    block_sparse_forward(c, n);
    return out.written("block-sparse out");
  };
  const std::vector<float> out = run(1, lse), other = run(threads, other_lse);
  require(same_bits(out, other) && same_bits(lse, other_lse), "block-sparse attention: bits differ with threads");
  std::vector<double> want(out.size()), want_lse(lse.size(), -INFINITY);
  for (int64_t row = 0; row < static_cast<int64_t>(lse.size()); ++row) {
    const int64_t i = row % p.queries, head = row / p.queries, b = head / p.query_heads, h = head % p.query_heads;
    const int64_t g = h / (p.query_heads / p.key_heads), list = head * per_head + i / p.block_q;
    std::vector<std::pair<int64_t, double>> logits;
    double top = -INFINITY, sum = 0.0;
    for (int32_t s = 0; s < counts[list]; ++s) {
      const int64_t j0 = indices[list * c.capacity + s] * p.block_k;
      for (int64_t j = j0; j < std::min(p.keys, j0 + p.block_k) && j <= plus(i, p.offset); ++j) {
        double dot = 0.0;
        for (int64_t e = 0; e < p.width; ++e) dot += double(q.data[q.at(b, h, i) + e]) * k.data[k.at(b, g, j) + e];
        logits.push_back({j, dot * c.scale});
        top = std::fmax(top, logits.back().second);
      }
    }
    for (const auto& [j, x] : logits) sum += std::exp(x - top);
    if (logits.empty()) continue;
    want_lse[row] = top + std::log(sum);
    for (const auto& [j, x] : logits)
      for (int64_t e = 0; e < c.value_width; ++e)
        want[row * c.value_width + e] += std::exp(x - want_lse[row]) * v.data[v.at(b, g, j) + e];
  }
  require_close(out, want, 1e-5, "block-sparse out");
  require_close(lse, want_lse, 1e-5, "block-sparse lse");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  in.one_in(2) ? attend(in, draw, threads) : select(in, draw, threads);
  return 0;
}
