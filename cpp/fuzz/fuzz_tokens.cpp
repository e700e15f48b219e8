// Token matching, selection, gathering, scattering and weights of drawn shapes, strides and indices, against loops
// written from the definitions; one to four threads bit for bit; calls that do not fit are refused.
#include <algorithm>

#include "input.hpp"
#include "vlm/tokens.hpp"
#include "vlm/view.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

constexpr int64_t unset = -12345;

// Every choice must be a best one up to rounding; the orders and maps must be those of the choice, exactly.
void match(Bytes& in, Draw& draw, int threads) {
  TokenMatch c{};
  c.batch = in.size(4), c.heads = in.between(1, 3), c.length = in.size(90), c.width = in.size(40);
  c.protect = in.below(6);
  const int64_t most = std::max<int64_t>(c.length - c.protect, 0) / 2;
  c.merged = in.below(most + 1);
  c.order = static_cast<MatchOrder>(in.below(3));
  Field metric(in, c.batch, c.heads, c.length, c.width);
  metric.fill(draw);
  if (in.one_in(3))  // equal rows, and rows that hold no number
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t n = 1; n < c.length; ++n)
          for (int64_t e = 0; e < c.width && draw.below(2) == 0; ++e)
            metric.data[metric.at(b, h, n) + e] = draw.below(40) == 0 ? NAN : metric.data[metric.at(b, h, n - 1) + e];
  const Heads view = metric.view<Heads>();
  c.metric = view.data, c.batch_stride = view.batch_stride, c.head_stride = view.head_stride,
  c.row_stride = view.row_stride;
  about = words("match B", c.batch, "H", c.heads, "N", c.length, "D", c.width, "merged", c.merged, "protect", c.protect,
                "order", int(c.order));
  if (in.one_in(12)) {
    int64_t* sizes[] = {&c.batch, &c.heads, &c.length, &c.width, &c.merged, &c.protect};
    switch (in.below(4)) {
      case 0: c.merged = most + 1 + in.below(4); break;
      case 1: c.heads = 0; break;
      case 2: c.order = static_cast<MatchOrder>(in.one_in(2) ? -1 : 3 + in.below(99)); break;
      default: *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
    }
    require_refused([&] { token_match(c, threads); }, "token match");
    return;
  }
  struct Results {
    std::vector<int64_t> source, target, kept, assign;
  };
  const auto run = [&](int n) {
    Results r{std::vector<int64_t>(c.batch * c.merged, unset), std::vector<int64_t>(c.batch * c.merged, unset),
              std::vector<int64_t>(c.batch * (c.length - c.merged), unset),
              std::vector<int64_t>(c.batch * c.length, unset)};
    c.source = r.source.data(), c.target = r.target.data(), c.kept = r.kept.data(), c.assign = r.assign.data();
    token_match(c, n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(r.source == other.source && r.target == other.target && r.kept == other.kept && r.assign == other.assign,
          "token match: another result with threads");
  const int64_t rest = c.length - c.merged;
  for (int64_t b = 0; b < c.batch; ++b) {
    const auto cosine = [&](int64_t x, int64_t y) {
      double dot = 0, xx = 0, yy = 0;
      for (int64_t e = 0; e < c.width; ++e) {
        double u = 0, v = 0;
        for (int64_t h = 0; h < c.heads; ++h)
          u += metric.data[metric.at(b, h, x) + e], v += metric.data[metric.at(b, h, y) + e];
        dot += u * v, xx += u * u, yy += v * v;
      }
      const double value = dot / std::fmax(std::sqrt(xx * yy), 1e-30);
      return std::isnan(value) ? -INFINITY : value;
    };
    const auto best_of = [&](int64_t source) {
      double best = -INFINITY;
      for (int64_t goal = c.protect / 2 * 2 + 1; goal < c.length; goal += 2)
        best = std::fmax(best, cosine(source, goal));
      return best;
    };
    const int64_t *kept = r.kept.data() + b * rest, *assign = r.assign.data() + b * c.length;
    std::vector<int> seen(c.length, 0);
    for (int64_t k = 0; k < rest; ++k) {
      require(kept[k] >= 0 && kept[k] < c.length && seen[kept[k]]++ == 0, "token match: kept");
      require(assign[kept[k]] == k, "token match: a kept token is not at its place");
    }
    double last = INFINITY;
    for (int64_t m = 0; m < c.merged; ++m) {
      const int64_t source = r.source[b * c.merged + m], target = r.target[b * c.merged + m];
      require(source >= c.protect && source < c.length && source % 2 == 0 && seen[source]++ == 0,
              "token match: source");
      require(target >= c.protect && target < c.length && target % 2 == 1, "token match: target");
      require(assign[source] == assign[target], "token match: a source is not where its target is");
      const double value = cosine(source, target), best = best_of(source);
      require(value == best || value >= best - 1e-5, "token match: a better destination was passed over");
      require(value == last || value <= last + 1e-5, "token match: sources by falling cosine");
      last = value;
    }
    for (int64_t n = (c.protect + 1) / 2 * 2; n < c.length && c.merged > 0; n += 2)
      if (assign[n] >= 0 && kept[assign[n]] == n && c.protect / 2 * 2 + 1 < c.length)
        require(best_of(n) <= last + 1e-5, "token match: a closer source was passed over");
    for (int64_t k = 1; k < rest; ++k) {
      const bool rising = kept[k - 1] < kept[k], same_side = kept[k - 1] % 2 == kept[k] % 2;
      if (c.order == MatchOrder::position) require(rising, "token match: order by position");
      if (c.order == MatchOrder::sources_first && same_side) require(rising, "token match: sources first");
      if (c.order != MatchOrder::position)
        require(kept[k - 1] % 2 <= kept[k] % 2, "token match: sources before the others");
    }
  }
}

void select(Bytes& in, Draw& draw, int threads) {
  TokenSelect c{};
  c.batch = in.size(5), c.length = in.size(200);
  const int64_t all = c.batch * c.length, equal = in.below(3);
  std::vector<float> scores(all);
  for (float& s : scores) {
    const int64_t kind = draw.below(20);
    s = kind == 0   ? NAN
        : kind == 1 ? INFINITY
        : kind == 2 ? -INFINITY
        : kind == 3 ? -0.0f
        : kind == 4 ? 0.0f
                    : draw.number();
    if (equal == 2 && kind > 4) s = static_cast<float>(draw.below(4));
  }
  std::vector<int64_t> counts(c.batch), index(all, unset), found(c.batch, unset);
  for (int64_t& n : counts)
    n = draw.below(12) == 0 ? (draw.below(2) ? INT64_MAX : INT64_MIN) : draw.below(c.length + 2) - 1;
  std::vector<uint8_t> valid(all), always(all);
  for (uint8_t& x : valid) x = static_cast<uint8_t>(draw.below(4));
  for (uint8_t& x : always) x = draw.below(6) == 0;
  c.scores = scores.data(), c.counts = counts.data(), c.index = index.data(), c.found = found.data();
  c.valid = in.one_in(2) ? valid.data() : nullptr, c.always = in.one_in(2) ? always.data() : nullptr;
  about = words("select B", c.batch, "N", c.length, "valid", c.valid != nullptr, "always", c.always != nullptr);
  if (in.one_in(16)) {
    (in.one_in(2) ? c.batch : c.length) = in.one_in(2) ? INT64_MIN : -1 - in.below(9);
    require_refused([&] { token_select(c, threads); }, "token select");
    return;
  }
  token_select(c, threads);
  for (int64_t b = 0; b < c.batch; ++b) {
    std::vector<int64_t> want, rest;
    const auto value = [&](int64_t n) {
      const float s = scores[b * c.length + n];
      return std::isnan(s) ? -INFINITY : s;
    };
    for (int64_t n = 0; n < c.length; ++n) {
      if (c.valid != nullptr && valid[b * c.length + n] == 0) continue;
      (c.always != nullptr && always[b * c.length + n] != 0 ? want : rest).push_back(n);
    }
    std::stable_sort(rest.begin(), rest.end(), [&](int64_t x, int64_t y) { return value(x) > value(y); });
    rest.resize(std::clamp<int64_t>(counts[b], 0, static_cast<int64_t>(rest.size())));
    want.insert(want.end(), rest.begin(), rest.end());
    std::sort(want.begin(), want.end());
    require(found[b] == static_cast<int64_t>(want.size()), "token select: count");
    want.resize(c.length, -1);
    require(std::equal(want.begin(), want.end(), index.begin() + b * c.length), "token select: index");
  }
}

void rows(Bytes& in, Draw& draw, int threads) {
  const int64_t batch = in.size(4), many = in.size(60), few = in.size(40), width = in.size(in.one_in(6) ? 700 : 40);
  const bool weighted = in.one_in(2);
  Field x(in, batch, 1, many, width), y(in, batch, 1, few, width);
  x.fill(draw), y.fill(draw);
  std::vector<float> weights = draw.numbers(batch * many);
  std::vector<int64_t> index(batch * many);
  for (int64_t& i : index) i = draw.below(few + 1) - 1;
  for (int64_t n = 0; n < batch * many && weighted; ++n)
    if (draw.below(4) == 0) {
      weights[n] = 0.0f;  // not read
      std::fill_n(x.data.data() + x.at(n / many, 0, n % many), width, NAN);
    }
  const float* w = weighted ? weights.data() : nullptr;
  std::vector<float> moved(batch * many * width, untouched), sums(batch * few * width, untouched);
  TokenScatter scatter{batch,          many,         few,          width, x.data.data(),
                       x.batch_stride, x.row_stride, index.data(), w,     sums.data()};
  TokenGather gather{batch,        few, many,         width, y.data.data(), y.batch_stride,
                     y.row_stride, 4,   index.data(), w,     moved.data()};
  about = words("rows B", batch, "many", many, "few", few, "width", width, "weighted", weighted);
  if (in.one_in(10)) {
    if (in.one_in(2) && batch * many > 0) {
      index[draw.below(batch * many)] = in.one_in(2) ? few + in.below(3) : -2 - in.below(3);
    } else {
      const int64_t which = in.below(4), bad = in.one_in(2) ? INT64_MIN : -1 - in.below(9);
      int64_t* of_scatter[] = {&scatter.batch, &scatter.from_length, &scatter.length, &scatter.width};
      int64_t* of_gather[] = {&gather.batch, &gather.from_length, &gather.length, &gather.width};
      *of_scatter[which] = *of_gather[which] = bad;
    }
    require_refused([&] { token_scatter(scatter, threads); }, "token scatter");
    require_refused([&] { token_gather(gather, threads); }, "token gather");
    return;
  }
  std::vector<double> want_sums(sums.size()), want_moved(moved.size());
  for (int64_t n = 0; n < batch * many; ++n) {
    if (index[n] < 0 || (weighted && weights[n] == 0.0f)) continue;
    const double factor = weighted ? weights[n] : 1.0;
    for (int64_t e = 0; e < width; ++e) {
      want_sums[(n / many * few + index[n]) * width + e] += factor * x.data[x.at(n / many, 0, n % many) + e];
      want_moved[n * width + e] = factor * y.data[y.at(n / many, 0, index[n]) + e];
    }
  }
  token_scatter(scatter, threads), token_gather(gather, threads);
  require_close(sums, want_sums, 1e-5, "token scatter");
  require_close(moved, want_moved, 1e-6, "token gather");
  std::vector<float> again(sums.size(), untouched);
  scatter.to = again.data();
  token_scatter(scatter, 1);
  require(same_bits(sums, again), "token scatter: bits differ with threads");
  if (weighted) return;
  // Any type: bytes of several sizes move as they are.
  const int64_t sizes[] = {1, 2, 8, 3};
  gather.element_bytes = in.among(sizes);
  std::vector<uint8_t> from(batch * few * width * gather.element_bytes),
      to(batch * many * width * gather.element_bytes, 7);
  for (uint8_t& byte : from) byte = static_cast<uint8_t>(draw.next());
  gather.from = from.data(), gather.to = to.data(), gather.batch_stride = few * width, gather.row_stride = width;
  token_gather(gather, threads);
  const int64_t bytes = width * gather.element_bytes;
  for (int64_t n = 0; n < batch * many; ++n)
    for (int64_t e = 0; e < bytes; ++e)
      require(to[n * bytes + e] == (index[n] < 0 ? 0 : from[(n / many * few + index[n]) * bytes + e]),
              "token gather: bytes");
}

void weights(Bytes& in, Draw& draw) {
  const int64_t batch = in.size(4), length = in.size(60), slots = length == 0 ? in.size(5) : 1 + in.below(30);
  std::vector<int64_t> assign(batch * length);
  for (int64_t& a : assign) a = draw.below(slots);
  std::vector<float> sizes(batch * length), w(batch * length, untouched), totals(batch * slots, untouched);
  for (float& s : sizes) s = static_cast<float>(draw.below(4));
  TokenWeights c{batch,        length,   slots,        assign.data(), in.one_in(2) ? sizes.data() : nullptr,
                 in.one_in(2), w.data(), totals.data()};
  about = words("weights B", batch, "N", length, "slots", slots, "sizes", c.sizes != nullptr, "by size", c.by_size);
  if (in.one_in(10)) {
    if (in.one_in(2) && batch * length > 0) {
      assign[draw.below(batch * length)] = in.one_in(2) ? slots + in.below(3) : -1 - in.below(3);
    } else {
      int64_t* of[] = {&c.batch, &c.length, &c.slots};
      *in.among(of) = in.one_in(2) ? INT64_MIN : -1 - in.below(9);
    }
    require_refused([&] { token_weights(c); }, "token weights");
    return;
  }
  token_weights(c);
  for (int64_t n = 0; n < batch * length; ++n) {
    double total = 0.0, members = 0.0;
    const int64_t first = n / length * length;
    for (int64_t m = first; m < first + length; ++m)
      if (assign[m] == assign[n]) members += 1.0, total += c.sizes == nullptr ? 1.0 : sizes[m];
    const double want = c.by_size && total > 0 ? (c.sizes == nullptr ? 1.0 : sizes[n]) / total : 1.0 / members;
    require(std::fabs(w[n] - want) <= 1e-6, "token weights");
    require(totals[n / length * slots + assign[n]] == static_cast<float>(total), "token weights: sizes of slots");
  }
  for (float t : totals) require(t != untouched, "token weights: a slot was left out");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  switch (in.below(4)) {
    case 0: match(in, draw, threads); break;
    case 1: select(in, draw, threads); break;
    case 2: rows(in, draw, threads); break;
    default: weights(in, draw);
  }
  return 0;
}
