// Cross-entropy and divergences over rows of logits, against the float64 oracle; one to four threads bit for bit; calls
// that do not fit are refused.
#include "input.hpp"
#include "vlm/vocabulary.hpp"
#include "vocabulary_oracle.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

std::vector<float> logits(Draw& draw, int64_t rows, int64_t ids, int64_t stride, float scale, int64_t gone) {
  std::vector<float> values(rows > 0 ? (rows - 1) * stride + ids : 0, untouched);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t v = 0; v < ids; ++v)
      values[i * stride + v] = gone > 0 && draw.below(gone) == 0 ? -INFINITY : scale * draw.number();
  return values;
}

// Between the rows nothing may be written.
void gaps(const std::vector<float>& values, int64_t ids, int64_t stride) {
  for (int64_t at = 0; at < int64_t(values.size()); ++at)
    require(at % stride < ids || values[at] == untouched, "vocabulary: something between the rows was written");
}

void cross_entropy(Bytes& in, Draw& draw, int threads, int64_t R, int64_t V, int64_t stride) {
  const bool wrong = in.one_in(12);
  const std::vector<float> given = logits(draw, R, V, stride, 0.5f * in.between(1, 12), in.one_in(5) ? 3 : 0);
  const std::vector<float> bias = draw.numbers(V), factors = draw.numbers(R);
  std::vector<int64_t> labels(R);
  for (int64_t& y : labels) y = draw.below(5) == 0 ? -1 : draw.below(V);
  CrossEntropyRows call{R,
                        V,
                        {nullptr, stride},
                        in.one_in(2) && V > 0 ? bias.data() : nullptr,
                        labels.data(),
                        in.one_in(2) ? factors.data() : nullptr,
                        0.0f,
                        0.0f,
                        0.0f,
                        !in.one_in(3),
                        nullptr,
                        nullptr,
                        nullptr};
  if (in.one_in(3)) call.smoothing = 0.01f * static_cast<float>(in.below(99));
  if (in.one_in(3)) call.z_loss = 0.001f * static_cast<float>(in.below(100));
  if (in.one_in(3)) call.softcap = 0.5f + static_cast<float>(in.below(40));
  about = words("cross-entropy rows", R, "ids", V, "stride", stride, "bias", call.bias != nullptr, "smoothing",
                call.smoothing, "z", call.z_loss, "cap", call.softcap, "gradient", call.gradient);
  const bool nothing = R > 0 && V == 0;
  if (wrong || nothing) {
    switch (nothing ? 9 : in.below(6)) {
      case 0: call.rows = in.one_in(2) ? INT64_MIN : -1; break;
      case 1: call.ids = in.one_in(2) ? INT64_MIN : -1; break;
      case 2: call.smoothing = in.one_in(3) ? NAN : in.one_in(2) ? 1.0f : -0.1f; break;
      case 3: call.softcap = in.one_in(2) ? NAN : -1.0f; break;
      case 4: call.z_loss = in.one_in(2) ? NAN : INFINITY; break;
      case 9: break;
      default:
        if (R == 0) call.rows = -1;
        else labels[draw.below(R)] = in.one_in(2) ? V + in.below(3) : -2 - in.below(3);
    }
    require_refused([&] { cross_entropy_rows(call, threads); }, "cross-entropy: a call");
    return;
  }
  struct Results {
    std::vector<float> chunk, loss, log_p, lse;
  };
  const auto run = [&](int n) {
    Results r{given, std::vector<float>(R, untouched), std::vector<float>(R, untouched),
              std::vector<float>(R, untouched)};
    call.chunk.data = r.chunk.data();
    call.loss = r.loss.data(), call.log_p = r.log_p.data(), call.lse = r.lse.data();
    cross_entropy_rows(call, n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.chunk, other.chunk) && same_bits(r.loss, other.loss) && same_bits(r.log_p, other.log_p) &&
              same_bits(r.lse, other.lse),
          "cross-entropy: bits differ with threads");
  if (V > 0) gaps(r.chunk, V, stride);
  for (int64_t i = 0; i < R; ++i) {
    const test::CrossEntropyRow o = test::cross_entropy_oracle(call, given.data() + i * stride, i);
    require_close(std::vector<float>{r.lse[i]}, std::vector<double>{o.lse}, 1e-5, "cross-entropy lse");

    require_close(std::vector<float>{r.loss[i]}, std::vector<double>{o.loss}, 1e-5, "cross-entropy loss");
    require_close(std::vector<float>{r.log_p[i]}, std::vector<double>{o.log_p}, 1e-5, "cross-entropy log p");
    if (!call.gradient) continue;
    const auto row = r.chunk.begin() + i * stride;
    require_close(std::vector<float>(row, row + V), o.gradient, 2e-5, "cross-entropy gradient");
  }
}

void divergence(Bytes& in, Draw& draw, int threads, int64_t R, int64_t V, int64_t stride) {
  const bool wrong = in.one_in(12);
  const int64_t other_stride = V + in.below(4), gone = in.one_in(3) ? 1 + in.below(6) : 0;
  const float scale = 0.25f * static_cast<float>(in.between(1, 12));
  const std::vector<float> student = logits(draw, R, V, stride, scale, gone);
  const std::vector<float> teacher = logits(draw, R, V, other_stride, scale, gone), factors = draw.numbers(R);
  DivergenceRows call{R,
                      V,
                      {nullptr, stride},
                      {nullptr, other_stride},
                      in.one_in(2) ? factors.data() : nullptr,
                      static_cast<Divergence>(in.below(6)),
                      0.5f + 0.1f * static_cast<float>(in.below(40)),
                      0.05f + 0.009f * static_cast<float>(in.below(100)),
                      !in.one_in(3),
                      nullptr};
  about = words("divergence", int(call.kind), "rows", R, "ids", V, "stride", stride, "temperature", call.temperature,
                "mix", call.mix, "gradient", call.gradient, "gone", gone);
  if (wrong) {
    switch (in.below(5)) {
      case 0: call.rows = in.one_in(2) ? INT64_MIN : -1; break;
      case 1: call.ids = in.one_in(2) ? INT64_MIN : -1; break;
      case 2: call.temperature = in.one_in(3) ? NAN : in.one_in(2) ? 0.0f : -1.0f; break;
      case 3: call.kind = static_cast<Divergence>(in.one_in(2) ? -1 : 6 + in.below(99)); break;
      default:
        call.kind = static_cast<Divergence>(2 + in.below(3)), call.mix = in.one_in(3)   ? NAN
                                                                         : in.one_in(2) ? 1.0f
                                                                                        : 0.0f;
    }
    require_refused([&] { divergence_rows(call, threads); }, "divergence: a call");
    return;
  }
  struct Results {
    std::vector<float> student, teacher, value;
  };
  const auto run = [&](int n) {
    Results r{student, teacher, std::vector<float>(R, untouched)};
    call.student.data = r.student.data(), call.teacher.data = r.teacher.data(), call.value = r.value.data();
    divergence_rows(call, n);
    return r;
  };
  const Results r = run(1), other = run(threads);
  require(same_bits(r.student, other.student) && same_bits(r.value, other.value),
          "divergence: bits differ with threads");
  if (V > 0) gaps(r.student, V, stride), gaps(r.teacher, V, other_stride);
  for (int64_t i = 0; i < R; ++i) {
    std::vector<double> s(student.begin() + i * stride, student.begin() + i * stride + V);
    const std::vector<double> t(teacher.begin() + i * other_stride, teacher.begin() + i * other_stride + V);
    const auto value = [&] { return test::divergence_oracle(call.kind, s, t, call.temperature, call.mix); };
    require_close(std::vector<float>{r.value[i]}, std::vector<double>{value()}, 1e-5, "divergence value");
    if (!call.gradient) continue;
    for (int trial = 0; trial < 3 && V > 0; ++trial) {  // by differences, of some ids
      const int64_t v = draw.below(V);
      const double at = s[v], step = 1e-5, got = r.student[i * stride + v];
      if (std::isinf(s[v]) || std::isinf(t[v])) {
        require(got == 0.0, "divergence: gradient of an id that is left out");
        continue;
      }
      s[v] = at + step;
      const double above = value();
      s[v] = at - step;
      const double slope = (call.factors == nullptr ? 1.0 : factors[i]) * (above - value()) / (2 * step);
      s[v] = at;
      require(std::fabs(slope - got) <= 1e-4, "divergence gradient: " + std::to_string(slope - got));
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  const bool pairs = in.one_in(2);
  const int64_t R = in.size(12), V = in.size(in.one_in(4) ? 2100 : 80), stride = V + in.below(4);
  pairs ? divergence(in, draw, threads, R, V, stride) : cross_entropy(in, draw, threads, R, V, stride);
  return 0;
}
