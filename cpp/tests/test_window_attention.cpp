// Windowed attention against a float64 oracle over all pairs of a map.
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "vlm/window_attention.hpp"

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
    const Heads upstream{dout.data(), c.rows * c.columns * channels, c.columns * channels, channels};
    window_attention_backward(
        {problem(), out.data(), lse.data(), upstream, dqkv.data(), dtau.data(), dtable.data()}, threads);
  }
};

// Where a place of one axis lies after the roll: window, place inside it, and whether it wrapped around.
struct Place {
  int64_t window, inside;
  bool wrapped;
};
Place place_of(int64_t at, int64_t size, int64_t window, int64_t shift) {
  const int64_t padded = (size + window - 1) / window * window, rolled = (at - shift + padded) % padded;
  return {rolled / window, rolled % window, at < shift};
}

struct Oracle {
  std::vector<double> out, lse, dqkv, dtau, dtable;
};

Oracle oracle(const Tensors& t) {
  const Case& c = t.c;
  const int64_t n = c.rows * c.columns, D = c.width, step = 3 * t.channels + t.gap;
  Oracle o;
  o.out.resize(t.out.size());
  o.lse.resize(t.lse.size());
  o.dqkv.resize(t.dqkv.size());
  o.dtau.resize(c.heads);
  o.dtable.resize(t.table.size());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h) {
      auto input = [&](int64_t part, int64_t i) {
        return t.qkv.data() + (b * n + i) * step + part * t.channels + h * D;
      };
      auto length = [&](int64_t part, int64_t i) {
        double sum = 0;
        for (int64_t e = 0; e < D; ++e) sum += double(input(part, i)[e]) * input(part, i)[e];
        return std::sqrt(sum);
      };
      for (int64_t i = 0; i < n; ++i) {
        const Place y = place_of(i / c.columns, c.rows, c.window_rows, c.shift_rows);
        const Place x = place_of(i % c.columns, c.columns, c.window_columns, c.shift_columns);
        std::vector<int64_t> keys, offsets;
        std::vector<double> cosines, logits;
        double top = -INFINITY;
        for (int64_t j = 0; j < n; ++j) {
          const Place v = place_of(j / c.columns, c.rows, c.window_rows, c.shift_rows);
          const Place u = place_of(j % c.columns, c.columns, c.window_columns, c.shift_columns);
          if (v.window != y.window || u.window != x.window || v.wrapped != y.wrapped || u.wrapped != x.wrapped)
            continue;
          double cosine = 0;
          for (int64_t e = 0; e < D; ++e) cosine += double(input(0, i)[e]) * input(1, j)[e];
          cosine /= length(0, i) * length(1, j);
          const int64_t offset = (y.inside - v.inside + c.window_rows - 1) * (2 * c.window_columns - 1) + x.inside -
                                 u.inside + c.window_columns - 1;
          keys.push_back(j);
          offsets.push_back(offset);
          cosines.push_back(cosine);
          logits.push_back(t.tau[h] * cosine + t.table[offset * c.heads + h]);
          top = std::fmax(top, logits.back());
        }
        double sum = 0;
        for (double s : logits) sum += std::exp(s - top);
        o.lse[((b * c.heads + h) * n) + i] = top + std::log(sum);
        const float* dout = t.dout.data() + (b * n + i) * t.channels + h * D;
        double lean = 0;
        std::vector<double> slope(keys.size());
        for (std::size_t k = 0; k < keys.size(); ++k) {
          const double p = std::exp(logits[k] - top) / sum;
          for (int64_t e = 0; e < D; ++e) {
            const double v = input(2, keys[k])[e];
            o.out[(b * n + i) * t.channels + h * D + e] += p * v;
            slope[k] += dout[e] * v;
            o.dqkv[(b * n + keys[k]) * 3 * t.channels + 2 * t.channels + h * D + e] += p * dout[e];
          }
          lean += p * slope[k];
        }
        for (std::size_t k = 0; k < keys.size(); ++k) {
          const double ds = std::exp(logits[k] - top) / sum * (slope[k] - lean);
          o.dtau[h] += ds * cosines[k];
          o.dtable[offsets[k] * c.heads + h] += ds;
          const double lq = length(0, i), lk = length(1, keys[k]);
          for (int64_t e = 0; e < D; ++e) {
            const double q = input(0, i)[e] / lq, key = input(1, keys[k])[e] / lk;
            o.dqkv[(b * n + i) * 3 * t.channels + h * D + e] += ds * t.tau[h] * (key - q * cosines[k]) / lq;
            o.dqkv[(b * n + keys[k]) * 3 * t.channels + t.channels + h * D + e] +=
                ds * t.tau[h] * (q - key * cosines[k]) / lk;
          }
        }
      }
    }
  return o;
}

void test_case(const Case& c) {
  Tensors t(c, 7);
  t.run(1);
  const Oracle o = oracle(t);
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
                          Case{0, 4, 4, 2, 4, 4, 4, 0, 0}})
      test_case(c);
    test_refusals();
  });
}
