// Recurrent mixers against the recurrence in double.
#include <stdexcept>

#include "check.hpp"
#include "recurrent_oracle.hpp"
#include "vlm/recurrent.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Scan {
  int64_t B, H, N, D, E, gap;
  bool reverse;
  std::vector<float> q, k, v, log_decay, state, out, final_state;
  std::vector<uint8_t> keep;
  std::vector<int32_t> run;

  Scan(int64_t b, int64_t h, int64_t n, int64_t d, int64_t e, bool masks, bool reverse_)
      : B(b), H(h), N(n), D(d), E(e), gap(3), reverse(reverse_) {
    Numbers numbers(17);
    q = numbers.normal(B * H * N * (D + gap));
    k = numbers.normal(B * H * N * (D + gap));
    v = numbers.normal(B * H * N * (E + gap));
    state = numbers.normal(B * H * D * E);
    for (int64_t i = 0; i < H; ++i) log_decay.push_back(i == 0 ? 0.0f : -0.02f * float(i * i * i));
    out.assign(B * H * N * E, 7.0f);
    final_state.assign(B * H * D * E, 7.0f);
    if (!masks) return;
    for (int64_t i = 0; i < B; ++i) {
      int32_t now = 0;
      bool any = false;
      for (int64_t t = 0; t < N; ++t) {
        const bool there = numbers.below(4) != 0;
        if (there && any && numbers.below(9) == 0) ++now;
        any = any || there;
        keep.push_back(there);
        run.push_back(now);
      }
    }
    for (int64_t i = 0; i < B * H * N; ++i)  // what does not exist may hold anything
      if (keep[i / (H * N) * N + i % N] == 0) q[i * (D + gap)] = k[i * (D + gap)] = v[i * (E + gap)] = NAN;
  }
  LinearScan problem(int64_t chunk) {
    const auto heads = [&](const std::vector<float>& x, int64_t width) {
      return Heads{x.data(), H * N * width, N * width, width};
    };
    return {B, H, N, D, E, heads(q, D + gap), heads(k, D + gap), heads(v, E + gap), log_decay.data(), state.data(),
            keep.empty() ? nullptr : keep.data(), run.empty() ? nullptr : run.data(), reverse, chunk,
            {out.data(), H * N * E, N * E, E}, final_state.data(), nullptr, 1};
  }
  void call(int64_t chunk, int threads) { linear_scan(problem(chunk), threads); }
};

void compare(int64_t B, int64_t H, int64_t N, int64_t D, int64_t E) {
  for (bool masks : {false, true})
    for (bool reverse : {false, true})
      for (int64_t chunk : {1, 16, 48, 64}) {
        const std::string name = "scan N" + std::to_string(N) + " D" + std::to_string(D) + " E" + std::to_string(E) +
                                 " chunk" + std::to_string(chunk) + (masks ? " masks" : "") +
                                 (reverse ? " reverse" : "");
        Scan one(B, H, N, D, E, masks, reverse), three = one;
        one.call(chunk, 1);
        three.call(chunk, 3);
        const ScanAnswer o = scan_oracle(one.problem(chunk));
        check_close(one.out, o.out, 4e-6, name + " out");
        check_close(one.final_state, o.last, 4e-6, name + " state");
        check(same_bits(one.out, three.out) && same_bits(one.final_state, three.final_state), name + " threads");
      }
}

// The selective scan: values against the recurrence, gradients against finite differences of it in double.
struct Ssm {
  int64_t B, N, C, S;
  std::vector<float> x, delta, rate, b, c, skip, state, out, last, borders;
  std::vector<std::vector<float>> gradients;
  std::vector<uint8_t> keep;
  std::vector<int32_t> run;

  Ssm(int64_t batch, int64_t n, int64_t channels, int64_t states) : B(batch), N(n), C(channels), S(states) {
    Numbers numbers(5);
    x = numbers.normal(B * N * C);
    delta = numbers.normal(B * N * C);
    rate = numbers.normal(C * S);
    for (float& r : rate) r = -std::fabs(r);
    b = numbers.normal(B * N * S);
    c = numbers.normal(B * N * S);
    skip = numbers.normal(C);
    state = numbers.normal(B * C * S);
    for (int64_t i = 0; i < B * N; ++i) {
      keep.push_back(i % N % 5 != 3);
      run.push_back(int32_t(i % N / 20));
    }
    out.resize(B * N * C);
    last.resize(B * C * S);
    borders.resize(B * ((N + SSM_CHUNK - 1) / SSM_CHUNK) * C * S);
    for (int64_t n_ : {B * N * C, B * N * C, C * S, B * N * S, B * N * S, C, B * C * S})
      gradients.push_back(std::vector<float>(n_));
  }
  SsmProblem problem() const {
    return {B, N, C, S, {x.data(), N * C, C}, {delta.data(), N * C, C}, rate.data(), {b.data(), N * S, S},
            {c.data(), N * S, S}, skip.data(), state.data(), keep.data(), run.data()};
  }
  // Loss: the sum of out * (1 + place % 3) and of the last state.
  double loss(const std::vector<double> (&in)[7], std::vector<double>* values) const {
    double sum = 0.0;
    for (int64_t row = 0; row < B; ++row)
      for (int64_t ch = 0; ch < C; ++ch)
        for (int64_t s = 0; s < S; ++s) {
          double h = in[6][(row * C + ch) * S + s];
          for (int64_t t = 0; t < N; ++t) {
            const int64_t at = row * N + t;
            if (t > 0 && run[at] != run[at - 1]) h = 0.0;
            if (keep[at] == 0) continue;
            const double step = std::log1p(std::exp(in[1][at * C + ch])), x_ = in[0][at * C + ch];
            h = std::exp(step * in[2][ch * S + s]) * h + step * x_ * in[3][at * S + s];
            const double out_ = h * in[4][at * S + s] + (s == 0 ? in[5][ch] * x_ : 0.0);
            if (values != nullptr) (*values)[at * C + ch] += out_;
            sum += out_ * double(1 + (at * C + ch) % 3);
          }
          sum += h;
        }
    return sum;
  }
  void check_all() {
    const std::string name = "ssm N" + std::to_string(N) + " C" + std::to_string(C) + " S" + std::to_string(S);
    std::vector<float> dout(B * N * C), dlast(B * C * S, 1.0f);
    for (std::size_t i = 0; i < dout.size(); ++i) dout[i] = float(1 + i % 3);
    std::vector<std::vector<float>> first;
    for (int threads : {1, 3}) {
      ssm_forward({problem(), out.data(), last.data(), borders.data()}, threads);
      ssm_backward({problem(), borders.data(), {dout.data(), N * C, C}, dlast.data(), gradients[0].data(),
                    gradients[1].data(), gradients[2].data(), gradients[3].data(), gradients[4].data(),
                    gradients[5].data(), gradients[6].data()},
                   threads);
      if (threads == 1) first = gradients;
      for (int i = 0; i < 7; ++i) check(same_bits(first[i], gradients[i]), name + " threads");
    }
    const std::vector<float>* inputs[7] = {&x, &delta, &rate, &b, &c, &skip, &state};
    std::vector<double> in[7], values(B * N * C, 0.0);
    for (int i = 0; i < 7; ++i) in[i].assign(inputs[i]->begin(), inputs[i]->end());
    loss(in, &values);
    check_close(out, values, 4e-6, name + " out");
    Numbers numbers(3);
    for (int i = 0; i < 7; ++i)
      for (int trial = 0; trial < 6; ++trial) {
        const int64_t place = numbers.below(int64_t(in[i].size()));
        const double before = in[i][place], small = 1e-5;
        in[i][place] = before + small;
        const double above = loss(in, nullptr);
        in[i][place] = before - small;
        const double slope = (above - loss(in, nullptr)) / (2 * small);
        in[i][place] = before;
        check(std::fabs(slope - gradients[i][place]) <= 1e-4 * std::fmax(1.0, std::fabs(slope)),
              name + " gradient " + std::to_string(i));
      }
  }
};

// A decay of 0 forgets everything but the position itself; borders as far apart as can be are one.
void nothing_is_remembered() {
  Scan one(1, 2, 37, 5, 6, false, false);
  one.log_decay = {-INFINITY, 0.0f};
  std::vector<float> border(2 * 5 * 6, 7.0f);
  LinearScan call = one.problem(16);
  call.boundaries = border.data();
  call.boundary_every = INT64_MAX;
  linear_scan(call, 1);
  check_close(one.out, scan_oracle(call).out, 4e-6, "a decay of 0");
  check(same_bits(border, one.state), "the first border is the state that comes in");
}

void refused() {
  Scan one(1, 1, 3, 2, 2, false, false);
  one.log_decay[0] = 0.1f;
  try {
    one.call(16, 1);
    check(false, "growing states are refused");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (int64_t n : {0, 1, 15, 16, 17, 47, 64, 65, 131}) compare(2, 3, n, 5, 7);
    compare(1, 2, 200, 64, 64);
    compare(1, 1, 97, 33, 130);
    compare(0, 2, 9, 4, 4);
    compare(1, 9, 70, 1, 1);
    Ssm(2, 131, 19, 3).check_all();
    Ssm(1, 64, 70, 16).check_all();
    nothing_is_remembered();
    refused();
  });
}
