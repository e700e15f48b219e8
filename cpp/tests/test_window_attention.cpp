// Windowed attention against a float64 oracle over all pairs of a map.
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "vlm/window_attention.hpp"
#include "window_oracle.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t batch, rows, columns, heads, width, window_rows, window_columns, shift_rows, shift_columns;
  std::string name() const {
    return "B" + std::to_string(batch) + " map " + std::to_string(rows) + "x" + std::to_string(columns) + " h" +
           std::to_string(heads) + " D" + std::to_string(width) + " window " + std::to_string(window_rows) + "x" +
           std::to_string(window_columns) + " shift " + std::to_string(shift_rows) + "," +
           std::to_string(shift_columns);
  }
};

// Everything a call reads and writes. Positions of the input have a gap of NaN behind their channels.
struct Tensors {
  Case c;
  int64_t gap = 5, channels, offsets;
  std::vector<float> qkv, tau, table, dout, out, lse, dqkv, dtau, dtable;

  Tensors(const Case& c_, uint64_t seed) : c(c_), channels(c_.heads * c_.width) {
    offsets = (2 * c.window_rows - 1) * (2 * c.window_columns - 1);
    Numbers numbers(seed);
    const int64_t positions = c.batch * c.rows * c.columns;
    qkv = numbers.normal(positions * (3 * channels + gap));
    for (int64_t i = 0; i < positions; ++i)
      for (int64_t g = 0; g < gap; ++g)
        qkv[i * (3 * channels + gap) + 3 * channels + g] = std::numeric_limits<float>::quiet_NaN();
    tau = numbers.normal(c.heads);
    for (float& t : tau) t = 4.0f + t;
    table = numbers.normal(offsets * c.heads);
    dout = numbers.normal(positions * channels);
    out.resize(positions * channels);
    lse.resize(positions * c.heads);
    dqkv.resize(positions * 3 * channels);
    dtau.resize(c.heads);
    dtable.resize(table.size());
  }
  WindowAttentionProblem problem() const {
    const int64_t step = 3 * channels + gap;
    return {c.batch, c.rows, c.columns, c.heads, c.width, c.window_rows, c.window_columns, c.shift_rows,
            c.shift_columns, {qkv.data(), c.rows * c.columns * step, c.columns * step, step}, tau.data(), table.data()};
  }
  void run(int threads) {
    window_attention_forward({problem(), out.data(), lse.data()}, threads);
    window_attention_backward(call(), threads);
  }
  WindowAttentionBackward call() {
    const Heads upstream{dout.data(), c.rows * c.columns * channels, c.columns * channels, channels};
    return {problem(), out.data(), lse.data(), upstream, dqkv.data(), dtau.data(), dtable.data()};
  }
};

void test_case(const Case& c) {
  Tensors t(c, 7);
  t.run(1);
  const WindowAnswer o = window_oracle(t.call());
  check_close(t.out, o.out, 1e-5, c.name() + " out");
  check_close(t.lse, o.lse, 1e-5, c.name() + " lse");
  check_close(t.dqkv, o.dqkv, 2e-5, c.name() + " dqkv");
  check_close(t.dtau, o.dtau, 1e-4, c.name() + " dtau");
  check_close(t.dtable, o.dtable, 1e-4, c.name() + " dtable");
  Tensors other(c, 7);
  other.run(3);
  check(same_bits(t.out, other.out) && same_bits(t.dqkv, other.dqkv) && same_bits(t.dtau, other.dtau) &&
            same_bits(t.dtable, other.dtable),
        c.name() + " bits with three threads");
}

void test_refusals() {
  for (const Case& c : {Case{1, 4, 4, 1, 4, 0, 4, 0, 0}, Case{1, 4, 4, 1, 4, 4, 4, 4, 0},
                        Case{1, 4, 4, 1, 4, 4, 4, 0, -1},
                        Case{-1, 4, 4, 1, 4, 4, 4, 0, 0}}) {
    WindowAttentionForward call{};
    call.problem = {c.batch, c.rows, c.columns, c.heads, c.width, c.window_rows, c.window_columns, c.shift_rows,
                    c.shift_columns, {}, nullptr, nullptr};
    bool refused = false;
    try {
      window_attention_forward(call, 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, c.name() + " is refused");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (const Case& c : {Case{2, 8, 8, 2, 16, 4, 4, 0, 0}, Case{2, 8, 8, 2, 16, 4, 4, 2, 2},
                          Case{1, 7, 9, 3, 5, 4, 4, 2, 2},
                          Case{1, 5, 13, 1, 17, 3, 5, 0, 4}, Case{1, 1, 1, 1, 1, 1, 1, 0, 0},
                          Case{1, 2, 3, 1, 8, 7, 7, 3, 3},
                          Case{1, 18, 18, 1, 24, 17, 17, 8, 8}, Case{9, 8, 4, 1, 8, 4, 4, 2, 1},
                          Case{0, 4, 4, 2, 4, 4, 4, 0, 0}, Case{2, 5, 4, 2, 0, 4, 3, 1, 2}})
      test_case(c);
    test_refusals();
  });
}
