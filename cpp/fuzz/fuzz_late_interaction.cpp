// Late interaction of drawn samples, tokens, strides and masks, against the float64 oracle; one to four threads and
// kept or recomputed maximisers bit for bit; calls that do not fit are refused.
#include "input.hpp"
#include "late_oracle.hpp"
#include "vlm/late_interaction.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

struct Side {
  TokenSet set{};
  std::vector<float> data;
  std::vector<uint8_t> mask;

  Side(Bytes& in, Draw& draw, int64_t samples, int64_t tokens, int64_t width) {
    set.samples = samples, set.tokens = tokens;
    if (in.below(2) == 0) {
      set.token_stride = width + in.below(5);
      set.sample_stride = tokens * set.token_stride + in.below(5);
    } else {  // tokens of one place side by side
      set.sample_stride = width + in.below(5);
      set.token_stride = samples * set.sample_stride;
    }
    const bool any = samples > 0 && tokens > 0;
    data.assign(any ? (samples - 1) * set.sample_stride + (tokens - 1) * set.token_stride + width : 0, NAN);
    const int64_t masked = in.below(4);
    if (masked != 0 && any) mask.resize(samples * tokens);
    for (int64_t i = 0; i < samples; ++i) {
      const bool empty = masked == 2 && draw.below(4) == 0;
      for (int64_t t = 0; t < tokens; ++t) {
        if (masked != 0) mask[i * tokens + t] = empty ? 0 : static_cast<uint8_t>(draw.below(4));
        if (masked != 0 && mask[i * tokens + t] == 0) continue;  // NaN stays
        for (int64_t e = 0; e < width; ++e)
          data[i * set.sample_stride + t * set.token_stride + e] = draw.number() / std::sqrt(static_cast<float>(width));
      }
    }
    set.data = data.data(), set.mask = mask.empty() ? nullptr : mask.data();
  }
};

struct Results {
  std::vector<float> rows, columns, drows, dcolumns;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  const bool wrong = in.one_in(12);
  const bool large = in.one_in(8);
  const int64_t R = in.size(large ? 3 : 20), T = in.size(large ? 130 : 20), C = in.size(large ? 3 : 20);
  const int64_t U = in.size(large ? 530 : 20), E = in.size(30);
  const Side v(in, draw, R, T, E), w(in, draw, C, U, E);
  LateProblem p{v.set, w.set, E, in.one_in(2)};
  about = words("R", R, "T", T, "C", C, "U", U, "E", E, "masks", v.set.mask != nullptr, "", w.set.mask != nullptr,
                "mean", p.mean);
  if (wrong) {
    int64_t* sizes[] = {&p.rows.samples, &p.rows.tokens, &p.columns.samples, &p.columns.tokens, &p.width};
    *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(100);
    if (in.one_in(3)) p = {v.set, w.set, E, false}, (in.one_in(2) ? p.rows : p.columns).tokens = 65536 + in.below(9);
    require_refused([&] { late_forward({p, nullptr, nullptr, nullptr}, threads); }, "late interaction: a forward call");
    require_refused([&] { late_backward({p, nullptr, nullptr, nullptr, nullptr, nullptr}, threads); },
                    "late interaction: a backward call");
    return 0;
  }
  const std::vector<float> row_gradient = draw.numbers(R * C), column_gradient = draw.numbers(R * C);
  const float* up_rows = in.one_in(4) ? nullptr : row_gradient.data();
  const float* up_columns = in.one_in(4) ? nullptr : column_gradient.data();
  const bool with_rows = !in.one_in(5), with_columns = !in.one_in(5), found_first = in.one_in(2);
  const test::LateAnswer o = test::late_oracle(p, up_rows, up_columns);
  const auto run = [&](int n, bool keep) {
    Results r;
    r.rows.assign(R * C, untouched), r.columns.assign(R * C, untouched);
    r.drows.assign(with_rows ? R * T * E : 0, untouched), r.dcolumns.assign(with_columns ? C * U * E : 0, untouched);
    std::vector<uint16_t> found(keep ? R * C * (T + U) : 0);
    uint16_t* at = found.empty() ? nullptr : found.data();
    late_forward({p, r.rows.data(), r.columns.data(), at}, n);
    late_backward(
        {p, up_rows, up_columns, at, with_rows ? r.drows.data() : nullptr, with_columns ? r.dcolumns.data() : nullptr},
        n);
    return r;
  };
  const Results r = run(1, found_first), other = run(threads, !found_first);
  require(same_bits(r.rows, other.rows) && same_bits(r.columns, other.columns) && same_bits(r.drows, other.drows) &&
              same_bits(r.dcolumns, other.dcolumns),
          "late interaction: bits differ with threads or kept maximisers");
  require_close(r.rows, o.rows, 1e-5, "late rows");
  require_close(r.columns, o.columns, 1e-5, "late columns");
  if (o.margin < 1e-4) return 0;  // the maximisers are a matter of rounding
  if (with_rows) require_close(r.drows, o.drows, 1e-4, "late drows");
  if (with_columns) require_close(r.dcolumns, o.dcolumns, 1e-4, "late dcolumns");
  return 0;
}
