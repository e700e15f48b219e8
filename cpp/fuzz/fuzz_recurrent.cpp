// Linear attention with decay and the selective state-space scan, of drawn shapes, strides, chunks, documents and
// missing positions, against the recurrences in float64; one to four threads bit for bit; calls that do not fit are
// refused.
#include "input.hpp"
#include "recurrent_oracle.hpp"
#include "vlm/recurrent.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

// keep and run of [batch, length]: a position that does not exist has the run of the one before it.
struct Documents {
  std::vector<uint8_t> keep;
  std::vector<int32_t> run;
  bool with_keep, with_run;
  Documents(Bytes& in, Draw& draw, int64_t batch, int64_t length)
      : keep(batch * length, 1), run(batch * length, 0), with_keep(in.one_in(2)), with_run(in.one_in(2)) {
    const int64_t long_runs = 1 + in.below(30);
    for (int64_t b = 0; b < batch; ++b) {
      int32_t now = static_cast<int32_t>(draw.below(5)) - 2;
      bool any = false;
      for (int64_t t = 0; t < length; ++t) {
        const bool there = !with_keep || draw.below(4) != 0;
        if (there && any && draw.below(long_runs) == 0) now += 1 + static_cast<int32_t>(draw.below(3));
        any = any || there;
        keep[b * length + t] = there ? static_cast<uint8_t>(1 + draw.below(255)) : 0;
        run[b * length + t] = now;
      }
    }
  }
  const uint8_t* keeps() const { return with_keep ? keep.data() : nullptr; }
  const int32_t* runs() const { return with_run ? run.data() : nullptr; }
};

// A position that does not exist may hold anything.
void remove(Field& field, const Documents& documents) {
  for (int64_t b = 0; b < field.batch; ++b)
    for (int64_t h = 0; h < field.heads; ++h)
      for (int64_t n = 0; n < field.rows; ++n)
        if (documents.keep[b * field.rows + n] == 0)
          std::fill_n(field.data.data() + field.at(b, h, n), field.width, NAN);
}

void scan(Bytes& in, Draw& draw, int threads) {
  LinearScan c{};
  c.batch = in.size(3), c.heads = in.size(4), c.length = in.size(in.one_in(6) ? 300 : 90);
  c.width = in.size(40), c.value_width = in.size(40);
  Field q(in, c.batch, c.heads, c.length, c.width), k(in, c.batch, c.heads, c.length, c.width);
  Field v(in, c.batch, c.heads, c.length, c.value_width);
  const Field shape(in, c.batch, c.heads, c.length, c.value_width);
  const Documents documents(in, draw, c.batch, c.length);
  for (Field* field : {&q, &k, &v}) field->fill(draw), remove(*field, documents);
  c.q = q.view<Heads>(), c.k = k.view<Heads>(), c.v = v.view<Heads>();
  std::vector<float> decay(c.heads), state = draw.numbers(c.batch * c.heads * c.width * c.value_width);
  for (float& d : decay)
    d = draw.below(4) == 0 ? 0.0f : draw.below(9) == 0 ? -INFINITY : -0.02f * static_cast<float>(draw.below(200));
  c.log_decay = decay.data(), c.state = in.one_in(2) ? state.data() : nullptr;
  c.keep = documents.keeps(), c.run = documents.runs();
  c.reverse = in.one_in(2);
  const int64_t chunks[] = {16, 1, 2, 5, 48, 64, 256, 17};
  c.chunk = in.among(chunks);
  const int64_t every[] = {1, 2, 3, 1000, INT64_MAX};
  c.boundary_every = in.among(every);
  const bool with_boundaries = in.one_in(2), with_final = !in.one_in(4);
  about = words("scan B", c.batch, "H", c.heads, "N", c.length, "D", c.width, "E", c.value_width, "keep",
                c.keep != nullptr, "run", c.run != nullptr, "reverse", c.reverse, "chunk", c.chunk, "every",
                c.boundary_every, "state", c.state != nullptr, "boundaries", with_boundaries);
  if (in.one_in(12)) {
    switch (in.below(4)) {
      case 0: c.chunk = in.one_in(2) ? in.between(-2, 0) : 257 + in.below(9); break;
      case 1:
        c.boundaries = state.data() == nullptr ? decay.data() : state.data();
        if (c.boundaries == nullptr) return;
        c.boundary_every = -in.below(3);
        break;
      case 2:
        if (c.heads == 0) return;
        decay[draw.below(c.heads)] = in.one_in(2) ? NAN : 0.01f;
        break;
      default: {
        int64_t* sizes[] = {&c.batch, &c.heads, &c.length, &c.width, &c.value_width};
        *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
      }
    }
    require_refused([&] { linear_scan(c, threads); }, "linear scan");
    return;
  }
  const test::ScanAnswer o = test::scan_oracle(c);
  const int64_t pieces = (c.length + c.chunk - 1) / c.chunk;
  const int64_t kept = pieces == 0 ? 0 : (pieces - 1) / c.boundary_every + 1;
  struct Results {
    std::vector<float> out, last, boundaries;
  };
  const auto run = [&](int n) {
    Field out = shape;
    Results r;
    r.last.assign(o.last.size(), untouched);
    r.boundaries.assign(with_boundaries ? kept * static_cast<int64_t>(o.last.size()) : 0, untouched);
    c.out = out.view<MutableHeads>();
    c.final_state = with_final ? r.last.data() : nullptr;
    c.boundaries = with_boundaries ? r.boundaries.data() : nullptr;
    linear_scan(c, n);
    r.out = out.written("scan out");
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.out, other.out) && same_bits(r.last, other.last) && same_bits(r.boundaries, other.boundaries),
          "linear scan: bits differ with threads");
  require_close(r.out, o.out, 2e-5, "scan out");
  if (with_final) require_close(r.last, o.last, 2e-5, "scan state");
  for (float x : r.boundaries) require(std::isfinite(x) && x != untouched, "linear scan: a boundary was not written");
}

void ssm(Bytes& in, Draw& draw, int threads) {
  SsmProblem p{};
  p.batch = in.size(3), p.length = in.size(in.one_in(3) ? 140 : 40), p.channels = in.size(40), p.states = in.size(9);
  const int64_t B = p.batch, N = p.length, C = p.channels, S = p.states;
  const Documents documents(in, draw, B, N);
  Field x(in, B, 1, N, C), delta(in, B, 1, N, C), b(in, B, 1, N, S), c(in, B, 1, N, S), dout(in, B, 1, N, C);
  for (Field* field : {&x, &delta, &b, &c, &dout}) field->fill(draw), remove(*field, documents);
  const auto view = [](const Field& f) { return Rows{f.data.data(), f.batch_stride, f.row_stride}; };
  p.x = view(x), p.delta = view(delta), p.b = view(b), p.c = view(c);
  std::vector<float> rate = draw.numbers(C * S), skip = draw.numbers(C), state = draw.numbers(B * C * S);
  const std::vector<float> dfinal = draw.numbers(B * C * S);
  for (float& r : rate) r = draw.below(9) == 0 ? 0.0f : -std::fabs(r);
  p.rate = rate.data(), p.skip = skip.data(), p.state = in.one_in(2) ? state.data() : nullptr;
  p.keep = documents.keeps(), p.run = documents.runs();
  about = words("ssm B", B, "N", N, "C", C, "S", S, "keep", p.keep != nullptr, "run", p.run != nullptr, "state",
                p.state != nullptr);
  if (in.one_in(12)) {
    if (in.one_in(2) && C * S > 0) {
      rate[draw.below(C * S)] = in.one_in(2) ? NAN : 0.01f;
    } else {
      int64_t* sizes[] = {&p.batch, &p.length, &p.channels, &p.states};
      *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
    }
    require_refused([&] { ssm_forward({p, nullptr, nullptr, nullptr}, threads); }, "ssm forward");
    require_refused(
        [&] {
          ssm_backward({p, nullptr, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
                       threads);
        },
        "ssm backward");
    return;
  }
  const auto flat = [](const Field& f) {
    std::vector<double> values;
    for (int64_t i = 0; i < f.batch; ++i)
      for (int64_t n = 0; n < f.rows; ++n)
        for (int64_t e = 0; e < f.width; ++e) {
          const float value = f.data[f.at(i, 0, n) + e];
          values.push_back(std::isnan(value) ? 0.0 : value);
        }
    return values;
  };
  const auto wide = [](const std::vector<float>& values) { return std::vector<double>(values.begin(), values.end()); };
  test::SsmInputs inputs{flat(x), flat(delta), wide(rate), flat(b), flat(c), wide(skip), wide(state)};
  if (p.state == nullptr) std::fill(inputs.state.begin(), inputs.state.end(), 0.0);
  std::vector<double> out, last;
  const std::vector<double> up = flat(dout), up_last = wide(dfinal);
  test::ssm_oracle(p, inputs, up, up_last, &out, &last);
  std::vector<double>* of[] = {&inputs.x, &inputs.delta, &inputs.rate, &inputs.b,
                               &inputs.c, &inputs.skip,  &inputs.state};
  struct Results {
    std::vector<float> out, last, boundaries, gradients[7];
  };
  const auto run = [&](int n) {
    Results r;
    r.out.assign(out.size(), untouched), r.last.assign(last.size(), untouched);
    r.boundaries.assign(B * ((N + SSM_CHUNK - 1) / SSM_CHUNK) * C * S, untouched);
    for (int g = 0; g < 7; ++g) r.gradients[g].assign(of[g]->size(), untouched);
    ssm_forward({p, r.out.data(), r.last.data(), r.boundaries.data()}, n);
    auto& g = r.gradients;
    ssm_backward({p, r.boundaries.data(), view(dout), dfinal.data(), g[0].data(), g[1].data(), g[2].data(), g[3].data(),
                  g[4].data(), g[5].data(), g[6].data()},
                 n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.out, other.out) && same_bits(r.last, other.last) && same_bits(r.boundaries, other.boundaries),
          "ssm: bits differ with threads");
  for (int g = 0; g < 7; ++g)
    require(same_bits(r.gradients[g], other.gradients[g]), "ssm: gradients differ with threads");
  require_close(r.out, out, 2e-5, "ssm out");
  require_close(r.last, last, 2e-5, "ssm state");
  for (int g = 0; g < 7; ++g) {  // by differences, of some elements
    for (float value : r.gradients[g])
      require(std::isfinite(value) && value != untouched, "ssm: a gradient was not written");
    if (of[g]->empty()) continue;
    const int64_t at = draw.below(static_cast<int64_t>(of[g]->size()));
    if (g == 6 && p.state == nullptr) continue;
    double& value = (*of[g])[at];
    const double before = value, step = 1e-5;
    value = before + step;
    const double above = test::ssm_oracle(p, inputs, up, up_last, nullptr, nullptr);
    value = before - step;
    const double slope = (above - test::ssm_oracle(p, inputs, up, up_last, nullptr, nullptr)) / (2 * step);
    value = before;
    require(std::fabs(slope - r.gradients[g][at]) <= 5e-4 * std::fmax(1.0, std::fabs(slope)),
            "ssm gradient " + std::to_string(g) + ": " + std::to_string(slope - r.gradients[g][at]));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  in.one_in(2) ? ssm(in, draw, threads) : scan(in, draw, threads);
  return 0;
}
