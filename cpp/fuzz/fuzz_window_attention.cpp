// Windowed cosine attention of drawn maps, windows, shifts and strides, against the float64 oracle; one to four threads
// bit for bit; calls that do not fit are refused.
#include "input.hpp"
#include "vlm/window_attention.hpp"
#include "window_oracle.hpp"

using namespace vlm;
using namespace vlm::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  WindowAttentionProblem p{};
  p.batch = in.size(3), p.rows = in.size(14), p.columns = in.size(14), p.heads = in.size(3), p.width = in.size(24);
  p.window_rows = in.between(1, 9), p.window_columns = in.between(1, 9);
  p.shift_rows = in.below(p.window_rows), p.shift_columns = in.below(p.window_columns);
  const int64_t channels = p.heads * p.width;
  Field qkv(in, p.batch, p.rows, p.columns, 3 * channels), dout(in, p.batch, p.rows, p.columns, channels);
  qkv.fill(draw), dout.fill(draw);
  p.qkv = qkv.view<Heads>();
  std::vector<float> tau = draw.numbers(p.heads);
  for (float& t : tau) t = 3.0f + t;
  const std::vector<float> table = draw.numbers((2 * p.window_rows - 1) * (2 * p.window_columns - 1) * p.heads);
  p.tau = tau.data(), p.bias_table = table.data();
  about = words("window B", p.batch, "rows", p.rows, "columns", p.columns, "heads", p.heads, "D", p.width, "window",
                p.window_rows, "", p.window_columns, "shift", p.shift_rows, "", p.shift_columns);
  if (in.one_in(10)) {
    int64_t* sizes[] = {&p.batch, &p.rows, &p.columns, &p.heads, &p.width};
    const bool by_rows = in.one_in(2);
    int64_t &window = by_rows ? p.window_rows : p.window_columns, &shift = by_rows ? p.shift_rows : p.shift_columns;
    switch (in.below(3)) {
      case 0: window = in.one_in(3) ? 4097 : in.one_in(2) ? INT64_MAX : -in.below(3); break;
      case 1: shift = in.one_in(2) ? window + in.below(3) : -1 - in.below(3); break;
      default: *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
    }
    require_refused([&] { window_attention_forward({p, nullptr, nullptr}, threads); }, "window attention: forward");
    require_refused([&] { window_attention_backward({p, nullptr, nullptr, {}, nullptr, nullptr, nullptr}, threads); },
                    "window attention: backward");
    return 0;
  }
  WindowAttentionBackward call{p, nullptr, nullptr, dout.view<Heads>(), nullptr, nullptr, nullptr};
  const test::WindowAnswer o = test::window_oracle(call);
  struct Results {
    std::vector<float> out, lse, dqkv, dtau, dtable;
  };
  const auto run = [&](int n) {
    Results r;
    r.out.assign(o.out.size(), untouched), r.lse.assign(o.lse.size(), untouched);
    r.dqkv.assign(o.dqkv.size(), untouched), r.dtau.assign(o.dtau.size(), untouched);
    r.dtable.assign(o.dtable.size(), untouched);
    window_attention_forward({p, r.out.data(), r.lse.data()}, n);
    call.out = r.out.data(), call.lse = r.lse.data(), call.dqkv = r.dqkv.data(), call.dtau = r.dtau.data();
    call.dbias_table = r.dtable.data();
    window_attention_backward(call, n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.out, other.out) && same_bits(r.lse, other.lse) && same_bits(r.dqkv, other.dqkv) &&
              same_bits(r.dtau, other.dtau) && same_bits(r.dtable, other.dtable),
          "window attention: bits differ with threads");
  require_close(r.out, o.out, 1e-5, "window out");
  require_close(r.lse, o.lse, 1e-5, "window lse");
  require_close(r.dqkv, o.dqkv, 1e-4, "window dqkv");
  require_close(r.dtau, o.dtau, 1e-4, "window dtau");
  require_close(r.dtable, o.dtable, 1e-4, "window dtable");
  return 0;
}
