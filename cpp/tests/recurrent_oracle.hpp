// The recurrent mixers in float64, position by position, from the definitions of vlm/recurrent.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "vlm/recurrent.hpp"

namespace vlm::test {

struct ScanAnswer {
  std::vector<double> out, last;  // contiguous
};

inline ScanAnswer scan_oracle(const LinearScan& c) {
  ScanAnswer o{std::vector<double>(c.batch * c.heads * c.length * c.value_width, 0.0),
               std::vector<double>(c.batch * c.heads * c.width * c.value_width, 0.0)};
  const auto row = [](const Heads& t, int64_t b, int64_t h, int64_t n) {
    return t.data + b * t.batch_stride + h * t.head_stride + n * t.row_stride;
  };
  const int64_t N = c.length, D = c.width, E = c.value_width;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h) {
      double* S = o.last.data() + (b * c.heads + h) * D * E;
      for (int64_t i = 0; c.state != nullptr && i < D * E; ++i) S[i] = c.state[(b * c.heads + h) * D * E + i];
      const double decay = std::exp(double(c.log_decay[h]));
      int32_t now = c.run == nullptr || N == 0 ? 0 : c.run[b * N + (c.reverse ? N - 1 : 0)];
      for (int64_t visit = 0; visit < N; ++visit) {
        const int64_t t = c.reverse ? N - 1 - visit : visit;
        const int32_t own = c.run == nullptr ? 0 : c.run[b * N + t];
        for (int64_t i = 0; own != now && i < D * E; ++i) S[i] = 0.0;
        now = own;
        if (c.keep != nullptr && c.keep[b * N + t] == 0) continue;
        for (int64_t d = 0; d < D; ++d)
          for (int64_t e = 0; e < E; ++e) {
            double& s = S[d * E + e];
            s = (c.reverse ? s : decay * s) + double(row(c.k, b, h, t)[d]) * row(c.v, b, h, t)[e];
            o.out[((b * c.heads + h) * N + t) * E + e] += row(c.q, b, h, t)[d] * s;
            if (c.reverse) s *= decay;
          }
      }
    }
  return o;
}

// The selective scan. Loss: the sums of out * dout and of the last state * dfinal.
struct SsmInputs {
  std::vector<double> x, delta, rate, b, c, skip, state;  // contiguous
};

inline double ssm_oracle(const SsmProblem& p, const SsmInputs& in, const std::vector<double>& dout,
                         const std::vector<double>& dfinal, std::vector<double>* out, std::vector<double>* last) {
  double sum = 0.0;
  const int64_t N = p.length, C = p.channels, S = p.states;
  if (out != nullptr) out->assign(p.batch * N * C, 0.0);
  if (last != nullptr) last->assign(p.batch * C * S, 0.0);
  const auto kept = [&](int64_t at) { return p.keep == nullptr || p.keep[at] != 0; };
  for (int64_t row = 0; row < p.batch; ++row)
    for (int64_t ch = 0; ch < C; ++ch) {
      for (int64_t s = 0; s < S; ++s) {
        double h = in.state[(row * C + ch) * S + s];
        for (int64_t t = 0; t < N; ++t) {
          const int64_t at = row * N + t;
          if (p.run != nullptr && t > 0 && p.run[at] != p.run[at - 1]) h = 0.0;
          if (!kept(at)) continue;
          const double step = std::log1p(std::exp(in.delta[at * C + ch]));
          h = std::exp(step * in.rate[ch * S + s]) * h + step * in.x[at * C + ch] * in.b[at * S + s];
          sum += h * in.c[at * S + s] * dout[at * C + ch];
          if (out != nullptr) (*out)[at * C + ch] += h * in.c[at * S + s];
        }
        sum += h * dfinal[(row * C + ch) * S + s];
        if (last != nullptr) (*last)[(row * C + ch) * S + s] = h;
      }
      for (int64_t at = row * N; at < (row + 1) * N; ++at) {
        if (!kept(at)) continue;
        const double direct = in.skip[ch] * in.x[at * C + ch];
        sum += direct * dout[at * C + ch];
        if (out != nullptr) (*out)[at * C + ch] += direct;
      }
    }
  return sum;
}

}  // namespace vlm::test
