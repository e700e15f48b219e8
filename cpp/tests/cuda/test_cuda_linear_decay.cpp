// Chunked linear attention with decay against the recurrence in float64, in both directions.
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors {
  int64_t batch, heads, length, width, value_width;
  bool reverse, with_state;
  static constexpr int64_t gap = 3;
  std::vector<float> q, k, v, log_decay, state, out, final_state;

  Tensors(int64_t B, int64_t H, int64_t N, int64_t D, int64_t E, bool reverse_, bool with_state_)
      : batch(B), heads(H), length(N), width(D), value_width(E), reverse(reverse_), with_state(with_state_) {
    Numbers numbers(9);
    q = numbers.normal(B * N * H * (D + gap), 0.3f);
    k = numbers.normal(B * N * H * (D + gap), 0.3f);
    v = numbers.normal(B * N * H * (E + gap));
    state = numbers.normal(B * H * D * E);
    for (int64_t h = 0; h < H; ++h) log_decay.push_back(h == 0 ? 0.0f : h == 1 ? -0.05f : -INFINITY);  // 1, some, all
  }
  std::string name() const {
    return "B" + std::to_string(batch) + " H" + std::to_string(heads) + " N" + std::to_string(length) + " D" +
           std::to_string(width) + " E" + std::to_string(value_width) + " reverse" + std::to_string(reverse) +
           " state" + std::to_string(with_state);
  }
  int64_t at(int64_t b, int64_t n, int64_t h, int64_t columns) const {
    return ((b * length + n) * heads + h) * (columns + gap);
  }
  Heads inside(const std::vector<float>& t, int64_t columns) const {
    return {t.data(), length * heads * (columns + gap), columns + gap, heads * (columns + gap)};
  }
  void run() {
    out.assign(batch * heads * length * value_width, NAN);
    final_state.assign(batch * heads * width * value_width, NAN);
    const MutableHeads to{out.data(), heads * length * value_width, length * value_width, value_width};
    cuda::linear_decay({batch, heads, length, width, value_width, inside(q, width), inside(k, width),
                        inside(v, value_width), log_decay.data(), with_state ? state.data() : nullptr, reverse, to,
                        final_state.data()},
                       nullptr);
  }
};

struct Oracle {
  std::vector<double> out, final_state;
};

Oracle oracle(const Tensors& t) {
  Oracle o;
  const int64_t D = t.width, E = t.value_width;
  o.out.assign(t.batch * t.heads * t.length * E, 0.0);
  o.final_state.assign(t.batch * t.heads * D * E, 0.0);
  for (int64_t b = 0; b < t.batch; ++b)
    for (int64_t h = 0; h < t.heads; ++h) {
      double* S = o.final_state.data() + (b * t.heads + h) * D * E;
      for (int64_t x = 0; x < D * E && t.with_state; ++x) S[x] = t.state[(b * t.heads + h) * D * E + x];
      const double a = std::exp(double(t.log_decay[h]));
      for (int64_t step = 0; step < t.length; ++step) {
        const int64_t n = t.reverse ? t.length - 1 - step : step;
        double* out = o.out.data() + ((b * t.heads + h) * t.length + n) * E;
        for (int64_t d = 0; d < D; ++d)
          for (int64_t e = 0; e < E; ++e) {
            double& s = S[d * E + e];
            if (!t.reverse) s *= a;
            s += double(t.k[t.at(b, n, h, D) + d]) * t.v[t.at(b, n, h, E) + e];
            out[e] += t.q[t.at(b, n, h, D) + d] * s;
            if (t.reverse) s *= a;
          }
      }
    }
  return o;
}

bool close(const Tensors& t, const Oracle& o) {
  return error_between(t.out, o.out) <= 2e-6 && error_between(t.final_state, o.final_state) <= 2e-6;
}

void compare(const Tensors& given) {
  Tensors t = given;
  const Oracle o = oracle(t);
  in_every_mode([&](const std::string& mode) {
    t.run();
    check_close(t.out, o.out, 2e-6, t.name() + " " + mode + " out");
    check_close(t.final_state, o.final_state, 2e-6, t.name() + " " + mode + " state");
  });
}

}  // namespace

int main() {
  return run_emulated([] {
    for (bool reverse : {false, true}) {
      compare({1, 1, 1, 1, 1, reverse, false});
      compare({1, 1, 0, 3, 4, reverse, true});
      compare({1, 2, 5, 0, 4, reverse, false});
      for (int64_t n : {63, 64, 65}) compare({1, 3, n, 17, 9, reverse, true});
      compare({2, 3, 130, 65, 70, reverse, true});
      compare({1, 2, 100, 128, 64, reverse, false});
      const Tensors small(1, 2, 150, 16, 16, reverse, true);
      const Oracle o = oracle(small);
      every_barrier_is_needed("linear decay", [&] {
        Tensors t = small;
        t.run();
        return close(t, o);
      });
    }
  });
}
