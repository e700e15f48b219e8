// Chunked linear attention with decay against the recurrence in float64, in both directions.
#include <algorithm>

#include "../recurrent_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Tensors {
  int64_t batch, heads, length, width, value_width;
  bool reverse, with_state;
  static constexpr int64_t gap = 3;
  std::vector<float> q, k, v, log_decay, state, out, final_state, boundaries;
  int64_t every = 1;

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
  LinearScan call() {
    const MutableHeads to{out.data(), heads * length * value_width, length * value_width, value_width};
    return {batch, heads, length, width, value_width, inside(q, width), inside(k, width), inside(v, value_width),
            log_decay.data(), with_state ? state.data() : nullptr, nullptr, nullptr, reverse, cuda::LINEAR_CHUNK, to,
            final_state.data(), boundaries.data(), every};
  }
  void run() {
    out.assign(batch * heads * length * value_width, NAN);
    final_state.assign(batch * heads * width * value_width, NAN);
    const int64_t span = every * cuda::LINEAR_CHUNK;
    boundaries.assign(batch * heads * ((length + span - 1) / span) * width * value_width, NAN);
    cuda::linear_scan(call(), nullptr);
  }
};

// The states at the borders of spans are the last ones of shorter sequences.
std::vector<double> borders(Tensors& t) {
  const int64_t span = t.every * cuda::LINEAR_CHUNK, spans = (t.length + span - 1) / span;
  const int64_t cell = t.width * t.value_width;
  std::vector<double> states(t.batch * t.heads * spans * cell);
  for (int64_t i = 0; i < spans; ++i) {
    LinearScan part = t.call();
    const int64_t start = i * span;
    part.length = t.reverse ? t.length - start : start;
    if (t.reverse)
      for (Heads* h : {&part.q, &part.k, &part.v}) h->data += start * h->row_stride;
    const ScanAnswer o = scan_oracle(part);
    for (int64_t head = 0; head < t.batch * t.heads; ++head)
      std::copy_n(o.last.begin() + head * cell, cell, states.begin() + (head * spans + i) * cell);
  }
  return states;
}

bool close(Tensors& t, const ScanAnswer& o, const std::vector<double>& states) {
  return error_between(t.out, o.out) <= 2e-6 && error_between(t.final_state, o.last) <= 2e-6 &&
         error_between(t.boundaries, states) <= 2e-6;
}

void compare(const Tensors& given) {
  Tensors t = given;
  const ScanAnswer o = scan_oracle(t.call());
  const std::vector<double> states = borders(t);
  in_every_mode([&](const std::string& mode) {
    t.run();
    check_close(t.out, o.out, 2e-6, t.name() + " " + mode + " out");
    check_close(t.final_state, o.last, 2e-6, t.name() + " " + mode + " state");
    check_close(t.boundaries, states, 2e-6, t.name() + " " + mode + " borders");
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
      Tensors small(1, 2, 150, 16, 16, reverse, true);
      const ScanAnswer o = scan_oracle(small.call());
      const std::vector<double> states = borders(small);
      every_barrier_is_needed("linear decay", [&] {
        Tensors t = small;
        t.run();
        return close(t, o, states);
      });
    }
  });
}
