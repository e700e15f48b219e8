// Sequence alignment of drawn batches, lengths, strides, forbidden cells and gamma, against the float64 recursion and
// its differences; one to four threads bit for bit; calls that do not fit are refused.
#include "alignment_oracle.hpp"
#include "input.hpp"
#include "vlm/alignment.hpp"

using namespace vlm;
using namespace vlm::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  const bool wrong = in.one_in(10);
  const int64_t B = in.size(40), N = in.size(40), M = in.size(40);
  AlignmentProblem p{B, N, M, nullptr, 0, M + in.below(4), nullptr, nullptr, 0.0f};
  p.batch_stride = in.one_in(8) ? 0 : N * p.row_stride + in.below(4);
  const float gammas[] = {0.0f, 0.25f, 1.0f, 3.0f};
  p.gamma = in.among(gammas);
  const int64_t forbidden = in.one_in(3) ? 2 + in.below(8) : 0;
  std::vector<int64_t> n(B, N), m(B, M);
  const bool ragged = !in.one_in(3);
  for (int64_t b = 0; b < B && ragged; ++b) n[b] = draw.below(N + 1), m[b] = draw.below(M + 1);
  if (ragged && B > 0) p.row_lengths = n.data(), p.column_lengths = m.data();
  const bool any = B > 0 && N > 0 && M > 0;
  std::vector<float> cost(any ? (B - 1) * p.batch_stride + (N - 1) * p.row_stride + M : 0, NAN);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < n[b]; ++i)
      for (int64_t j = 0; j < m[b]; ++j)
        cost[b * p.batch_stride + i * p.row_stride + j] =
            forbidden > 0 && draw.below(forbidden) == 0 ? INFINITY : draw.number();
  p.cost = cost.data();
  about = words("B", B, "N", N, "M", M, "batch stride", p.batch_stride, "row stride", p.row_stride, "ragged", ragged,
                "gamma", p.gamma, "forbidden", forbidden);
  if (wrong) {
    switch (in.below(4)) {
      case 0: {
        int64_t* sizes[] = {&p.batch, &p.rows, &p.columns};
        *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(50);
        break;
      }
      case 1: p.gamma = in.one_in(3) ? NAN : in.one_in(2) ? INFINITY : -1.0f; break;
      default: {
        std::vector<int64_t>& lengths = in.one_in(2) ? n : m;
        const int64_t most = &lengths == &n ? N : M;
        if (B == 0) {
          p.batch = -1;
          break;
        }
        lengths[draw.below(B)] = in.one_in(2) ? most + 1 + in.below(3) : -1 - in.below(3);
        p.row_lengths = n.data(), p.column_lengths = m.data();
      }
    }
    require_refused([&] { alignment_forward({p, nullptr}, threads); }, "alignment: a forward call");
    require_refused([&] { alignment_backward({p, nullptr, nullptr}, threads); }, "alignment: a backward call");
    return 0;
  }
  const std::vector<float> upstream = draw.numbers(B);
  const auto run = [&](int threads_now, std::vector<float>& values, std::vector<float>& gradient) {
    values.assign(B, untouched), gradient.assign(B * N * M, untouched);
    alignment_forward({p, values.data()}, threads_now);
    alignment_backward({p, upstream.data(), gradient.data()}, threads_now);
  };
  std::vector<float> values, gradient, other_values, other_gradient;
  run(1, values, gradient), run(threads, other_values, other_gradient);
  require(same_bits(values, other_values) && same_bits(gradient, other_gradient),
          "alignment: bits differ with threads");
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> own;
    for (int64_t i = 0; i < n[b]; ++i)
      for (int64_t j = 0; j < m[b]; ++j) own.push_back(cost[b * p.batch_stride + i * p.row_stride + j]);
    const double value = test::alignment_oracle(own, n[b], m[b], p.gamma);
    require_close(std::vector<float>{values[b]}, std::vector<double>{value}, 1e-5, "alignment value");
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < M; ++j) {
        const float g = gradient[(b * N + i) * M + j];
        require(std::isfinite(g), "alignment: a gradient is not finite");
        if (i >= n[b] || j >= m[b] || std::isinf(value)) require(g == 0.0f, "alignment: a gradient where none is");
      }
    if (own.empty() || std::isinf(value)) continue;
    for (int trial = 0; trial < 2; ++trial) {
      const int64_t cell = draw.below(static_cast<int64_t>(own.size()));
      const float got = gradient[(b * N + cell / m[b]) * M + cell % m[b]];
      if (std::isinf(own[cell])) {
        require(got == 0.0f, "alignment: gradient of a forbidden cell");
        continue;
      }
      const double at = own[cell], step = 1e-6;
      own[cell] = at + step;
      const double above = test::alignment_oracle(own, n[b], m[b], p.gamma);
      own[cell] = at - step;
      const double slope = upstream[b] * (above - test::alignment_oracle(own, n[b], m[b], p.gamma)) / (2 * step);
      own[cell] = at;
      require(std::fabs(slope - got) <= 5e-4, "alignment gradient: " + std::to_string(slope - got));
    }
  }
  return 0;
}
