// Exact attention, forward and backward, of drawn shapes, strides, mask programs, biases, soft caps, cosine products
// and dropout, against the float64 oracle; one to four threads bit for bit; calls that do not fit are refused.
#include "attention_oracle.hpp"
#include "masks.hpp"
#include "vlm/attention.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

struct Results {
  std::vector<float> out, lse, dq, dk, dv, dbias, drelative, dtemperature;
  bool same(const Results& o) const {
    return same_bits(out, o.out) && same_bits(lse, o.lse) && same_bits(dq, o.dq) && same_bits(dk, o.dk) &&
           same_bits(dv, o.dv) && same_bits(dbias, o.dbias) && same_bits(drelative, o.drelative) &&
           same_bits(dtemperature, o.dtemperature);
  }
};

// Break one thing of a call that fits.
void spoil(Bytes& in, AttentionBackward& call, Masks& masks) {
  AttentionProblem& p = call.problem;
  switch (in.below(9)) {
    case 0: {
      int64_t* sizes[] = {&p.batch, &p.query_heads, &p.key_heads, &p.queries, &p.keys, &p.width, &p.value_width};
      *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(100);
      return;
    }
    case 1: p.key_heads = 0; return;
    case 2:
      p.query_heads = p.key_heads * in.below(4) + 1;
      p.key_heads = p.key_heads == 1 ? p.query_heads + 1 : p.key_heads;
      return;
    case 3: p.softcap = in.one_in(2) ? NAN : -1.0f; return;
    case 4: p.keep_share = in.one_in(2) ? NAN : -0.5f * static_cast<float>(in.below(2)); return;
    case 5: {
      static const float table[1] = {0.0f};
      p.relative = table;
      p.grid_columns = 1 + in.below(4);
      p.grid_rows = in.one_in(3) ? INT64_MAX / 2 : p.queries / p.grid_columns + 1 + in.below(2);
      return;
    }
    case 6: p.batch = 0, (in.one_in(2) ? p.queries : p.keys) = int64_t(INT32_MAX) + 1 + in.below(3); return;
    default: masks.spoil(in, p.queries); p.atoms = masks.atoms.data(), p.atom_count = int64_t(masks.atoms.size());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  const bool wrong = in.one_in(8), grid = in.one_in(6);
  AttentionProblem p{};
  p.batch = in.size(3);
  p.key_heads = in.between(1, 3);
  p.query_heads = p.key_heads * in.between(0, 3);
  int64_t rows = in.between(1, 7), columns = in.between(1, 9);
  p.queries = grid ? rows * columns : in.size(70);
  p.keys = grid ? p.queries : in.size(in.one_in(8) ? 600 : 80);
  p.width = in.size(40);
  p.value_width = in.size(40);
  Field q(in, p.batch, p.query_heads, p.queries, p.width), k(in, p.batch, p.key_heads, p.keys, p.width);
  Field v(in, p.batch, p.key_heads, p.keys, p.value_width), dout(in, p.batch, p.query_heads, p.queries, p.value_width);
  for (Field* field : {&q, &k, &v, &dout}) field->fill(draw);
  p.q = q.view<Heads>(), p.k = k.view<Heads>(), p.v = v.view<Heads>();
  const float scales[] = {1.0f, 0.0f, -1.0f, 2.5f};
  p.scale = in.among(scales) / std::sqrt(static_cast<float>(std::max<int64_t>(p.width, 1)));

  Masks masks;
  masks.draw(in, draw, p.batch, p.query_heads, p.queries, p.keys);
  p.atoms = masks.atoms.data(), p.atom_count = static_cast<int64_t>(masks.atoms.size());
  p.causal = in.one_in(3);
  p.causal_offset = masks.offset(in, p.queries, p.keys);
  std::vector<uint8_t> key_mask;
  if (in.one_in(3) && p.keys > 0) {
    p.key_mask_stride = in.one_in(3) ? 0 : p.keys + in.below(3);
    key_mask.resize(p.batch == 0 ? 0 : (p.batch - 1) * p.key_mask_stride + p.keys);
    for (uint8_t& x : key_mask) x = static_cast<uint8_t>(draw.below(3));
    p.key_mask = key_mask.data();
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t j = 0; j < p.keys; ++j) {
        if (key_mask[b * p.key_mask_stride + j] != 0) continue;
        for (int64_t h = 0; h < p.key_heads; ++h) {
          std::fill_n(k.data.data() + k.at(b, h, j), p.width, NAN);
          std::fill_n(v.data.data() + v.at(b, h, j), p.value_width, NAN);
        }
      }
  }
  AttentionBackward call{};
  call.bias_batch = in.one_in(2) ? p.batch : 1;
  call.bias_heads = in.one_in(2) ? p.query_heads : 1;
  call.bias_rows = in.one_in(2) ? p.queries : 1;
  Field bias(in, call.bias_batch, call.bias_heads, call.bias_rows, p.keys);
  bias.fill(draw);
  const bool with_bias = in.one_in(3) && !bias.data.empty();
  if (with_bias)
    p.bias = {bias.data.data(), call.bias_batch == 1 ? 0 : bias.batch_stride,
              call.bias_heads == 1 ? 0 : bias.head_stride, call.bias_rows == 1 ? 0 : bias.row_stride};
  if (in.one_in(4)) p.softcap = 0.5f + static_cast<float>(in.below(40));
  std::vector<float> relative, temperature;
  if (grid) p.grid_rows = rows, p.grid_columns = columns;
  if ((grid || in.one_in(5)) && p.queries + p.keys > 0) {
    const int64_t length = test::relative_length(p);
    p.relative_head_stride = in.one_in(2) ? length + in.below(3) : 0;
    relative = draw.numbers(p.query_heads == 0 ? 0 : length + (p.query_heads - 1) * p.relative_head_stride);
    p.relative = relative.empty() ? nullptr : relative.data();
  }
  if (in.one_in(4)) {
    p.temperature_stride = in.below(3);
    temperature = draw.numbers(p.query_heads == 0 ? 0 : 1 + (p.query_heads - 1) * p.temperature_stride);
    p.temperature = temperature.empty() ? nullptr : temperature.data();
  }
  p.keep_share = 1.0f;
  if (in.one_in(4)) {
    const double dropped = static_cast<double>(in.between(1, 200)) / 256.0;
    p.drop_below = static_cast<uint32_t>(dropped * 4294967296.0);
    p.keep_share = static_cast<float>(1.0 - dropped);
    p.seed = in.word();
  }
  const std::vector<float> dlse = draw.numbers(p.batch * p.query_heads * p.queries);
  call.problem = p;
  call.dout = dout.view<Heads>();
  call.dlse = in.one_in(3) ? nullptr : dlse.data();
  static float here[1];
  call.dbias = with_bias && !in.one_in(4) ? here : nullptr;
  call.drelative = p.relative != nullptr ? here : nullptr;
  call.dtemperature = p.temperature != nullptr ? here : nullptr;

  about = words("B", p.batch, "Hq", p.query_heads, "Hk", p.key_heads, "N", p.queries, "M", p.keys, "D", p.width, "V",
                p.value_width, "scale", p.scale, "causal", p.causal, "offset", p.causal_offset, "key mask",
                p.key_mask != nullptr, "bias", with_bias, "cap", p.softcap, "relative", p.relative != nullptr, "grid",
                p.grid_columns, "temperature", p.temperature != nullptr, "drop", p.drop_below) +
          masks.text();

  if (wrong || !masks.fits) {
    if (masks.fits) spoil(in, call, masks);
    require_refused([&] { attention_forward({call.problem, {}, nullptr}, threads); }, "attention: a forward call");
    require_refused([&] { attention_backward(call, threads); }, "attention: a backward call");
    return 0;
  }
  if (in.one_in(16)) {
    call.dbias = here;
    call.bias_rows = p.queries + 2;
    require_refused([&] { attention_backward(call, threads); }, "attention: extents of the bias gradient");
    return 0;
  }
  const test::AttentionAnswer o = test::attention_oracle(call);
  const Field out_shape(in, p.batch, p.query_heads, p.queries, p.value_width);
  const Field dq_shape(in, p.batch, p.query_heads, p.queries, p.width),
      dk_shape(in, p.batch, p.key_heads, p.keys, p.width);
  const Field dv_shape(in, p.batch, p.key_heads, p.keys, p.value_width);
  const auto run = [&](int n) {
    Field out = out_shape, dq = dq_shape, dk = dk_shape, dv = dv_shape;
    Results r;
    r.lse.assign(o.lse.size(), untouched);
    r.dbias.assign(o.dbias.size(), untouched);
    r.drelative.assign(o.drelative.size(), untouched);
    r.dtemperature.assign(o.dtemperature.size(), untouched);
    attention_forward({p, out.view<MutableHeads>(), r.lse.data()}, n);
    AttentionBackward back = call;
    back.out = out.view<Heads>(), back.lse = r.lse.data();
    back.dq = dq.view<MutableHeads>(), back.dk = dk.view<MutableHeads>(), back.dv = dv.view<MutableHeads>();
    back.dbias = call.dbias == nullptr ? nullptr : r.dbias.data();
    back.drelative = call.drelative == nullptr ? nullptr : r.drelative.data();
    back.dtemperature = call.dtemperature == nullptr ? nullptr : r.dtemperature.data();
    attention_backward(back, n);
    r.out = out.written("out"), r.dq = dq.written("dq"), r.dk = dk.written("dk"), r.dv = dv.written("dv");
    return r;
  };
  const Results r = run(1);
  require(r.same(run(threads)), "attention: bits differ with threads");
  require_close(r.out, o.out, 1e-5, "attention out");
  require_close(r.lse, o.lse, 1e-5, "attention lse");
  require_close(r.dq, o.dq, 1e-4, "attention dq");
  require_close(r.dk, o.dk, 1e-4, "attention dk");
  require_close(r.dv, o.dv, 1e-4, "attention dv");
  require_close(r.dbias, o.dbias, 1e-4, "attention dbias");
  require_close(r.drelative, o.drelative, 1e-4, "attention drelative");
  require_close(r.dtemperature, o.dtemperature, 1e-4, "attention dtemperature");
  return 0;
}
