// Recurrent mixers against the recurrence in double.
#include <stdexcept>

#include "check.hpp"
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
  void call(int64_t chunk, int threads) {
    const auto heads = [&](const std::vector<float>& x, int64_t width) {
      return Heads{x.data(), H * N * width, N * width, width};
    };
    linear_scan({B, H, N, D, E, heads(q, D + gap), heads(k, D + gap), heads(v, E + gap), log_decay.data(), state.data(),
                 keep.empty() ? nullptr : keep.data(), run.empty() ? nullptr : run.data(), reverse, chunk,
                 {out.data(), H * N * E, N * E, E}, final_state.data(), nullptr, 1},
                threads);
  }
  void oracle(std::vector<double>& want, std::vector<double>& last) const {
    want.assign(B * H * N * E, 0.0);
    last.assign(state.begin(), state.end());
    for (int64_t bh = 0; bh < B * H; ++bh) {
      double* S = last.data() + bh * D * E;
      const double decay = std::exp(double(log_decay[bh % H]));
      int32_t now = run.empty() ? 0 : run[bh / H * N + (reverse ? N - 1 : 0)];
      for (int64_t visit = 0; visit < N; ++visit) {
        const int64_t t = reverse ? N - 1 - visit : visit, row = bh * N + t;
        const int32_t own = run.empty() ? 0 : run[bh / H * N + t];
        if (own != now)
          for (int64_t i = 0; i < D * E; ++i) S[i] = 0.0;
        now = own;
        if (!keep.empty() && keep[bh / H * N + t] == 0) continue;
        for (int64_t d = 0; d < D; ++d)
          for (int64_t e = 0; e < E; ++e) {
            double& s = S[d * E + e];
            s = (reverse ? s : decay * s) + double(k[row * (D + gap) + d]) * v[row * (E + gap) + e];
            want[row * E + e] += q[row * (D + gap) + d] * s;
            if (reverse) s *= decay;
          }
      }
    }
  }
};

void compare(int64_t B, int64_t H, int64_t N, int64_t D, int64_t E) {
  for (bool masks : {false, true})
    for (bool reverse : {false, true})
      for (int64_t chunk : {1, 16, 48, 64}) {
        const std::string name = "scan N" + std::to_string(N) + " D" + std::to_string(D) + " E" + std::to_string(E) +
                                 " chunk" + std::to_string(chunk) + (masks ? " masks" : "") + (reverse ? " reverse" : "");
        Scan one(B, H, N, D, E, masks, reverse), three = one;
        one.call(chunk, 1);
        three.call(chunk, 3);
        std::vector<double> want, last;
        one.oracle(want, last);
        check_close(one.out, want, 4e-6, name + " out");
        check_close(one.final_state, last, 4e-6, name + " state");
        check(same_bits(one.out, three.out) && same_bits(one.final_state, three.final_state), name + " threads");
      }
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
    refused();
  });
}
