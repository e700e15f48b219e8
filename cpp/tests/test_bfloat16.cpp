// The products of level avx512_bf16: the tile, the products of the vocabulary losses, attention's use of them.
#include <limits>
#include <stdexcept>

#include "bfloat16_tiles.hpp"
#include "check.hpp"
#include "vlm/attention.hpp"
#include "vlm/half_products.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

uint16_t round_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
double widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
std::vector<uint16_t> halves(Numbers& numbers, int64_t count) {
  std::vector<uint16_t> to;
  for (float v : numbers.normal(count)) to.push_back(round_half(v));
  return to;
}

void compare_tile(PairLayout layout, bool transposed, int64_t M, int64_t N, int64_t K) {
  Numbers numbers(M * 10007 + N * 101 + K);
  std::vector<float> a = numbers.normal(M * K);
  std::vector<uint16_t> rounded, b = halves(numbers, N * K);
  for (float v : a) rounded.push_back(round_half(v));
  std::vector<uint8_t> keep(transposed ? N : K);
  const uint16_t nan = round_half(std::numeric_limits<float>::quiet_NaN());
  for (std::size_t r = 0; r < keep.size(); ++r) {
    keep[r] = numbers.below(4) > 0;
    const int64_t length = transposed ? K : N;
    for (int64_t e = 0; !keep[r] && e < length; ++e) b[r * length + e] = nan;
  }
  const int64_t ldc = (N + 15) / 16 * 16;
  std::vector<float> c(M * ldc);
  const void* from = layout == PairLayout::rows ? static_cast<const void*>(rounded.data()) : a.data();
  tile_product(layout, transposed, M, N, K, from, b.data(), keep.data(), c.data(), ldc);
  std::vector<float> got;
  std::vector<double> expected;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t left = layout == PairLayout::tile_columns ? k * M + m : m * K + k;
        if (keep[transposed ? n : k]) sum += widen(rounded[left]) * widen(b[transposed ? n * K + k : k * N + n]);
      }
      got.push_back(c[m * ldc + n]);
      expected.push_back(0.5 * sum);
    }
  check_close(got, expected, 1e-6, "tile " + std::to_string(int(layout)) + " " + std::to_string(M) + "x" +
                                       std::to_string(N) + "x" + std::to_string(K));
}

void compare_products(int64_t rows, int64_t ids, int64_t width) {
  const std::string name = "products " + std::to_string(rows) + "x" + std::to_string(ids) + "x" + std::to_string(width);
  Numbers numbers(rows + ids + width);
  const int64_t stride = width + 3;
  const std::vector<uint16_t> h = halves(numbers, rows * stride), w = halves(numbers, ids * stride);
  const std::vector<float> g = numbers.normal(rows * ids), start = numbers.normal(ids * width);
  struct Results {
    std::vector<float> z, dh, dw;
  };
  const auto run = [&](int threads) {
    Results r{std::vector<float>(rows * ids), std::vector<float>(rows * width), start};
    product_rows({rows, ids, width, {h.data(), stride}, {w.data(), stride}, {r.z.data(), ids}}, threads);
    product_gradients({rows, ids, width, {h.data(), stride}, {w.data(), stride}, {g.data(), ids},
                       {r.dh.data(), width}, {r.dw.data(), width}}, threads);
    return r;
  };
  const Results one = run(1);
  std::vector<double> z(rows * ids), dh(rows * width), dw(start.begin(), start.end());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t v = 0; v < ids; ++v)
      for (int64_t e = 0; e < width; ++e) {
        const double slope = widen(round_half(g[i * ids + v]));
        z[i * ids + v] += widen(h[i * stride + e]) * widen(w[v * stride + e]);
        dh[i * width + e] += slope * widen(w[v * stride + e]);
        dw[v * width + e] += slope * widen(h[i * stride + e]);
      }
  check_close(one.z, z, 2e-6, name + " z");
  check_close(one.dh, dh, 2e-6, name + " dh");
  check_close(one.dw, dw, 2e-6, name + " dw");
  for (int threads : {2, 5}) {
    const Results other = run(threads);
    check(same_bits(one.z, other.z) && same_bits(one.dh, other.dh) && same_bits(one.dw, other.dw),
          name + ": bits differ with " + std::to_string(threads) + " threads");
  }
}

// One head, forward only: the tests of the Python operator look at the rest.
void compare_attention(int64_t queries, int64_t keys, int64_t width, bool causal) {
  Numbers numbers(queries + keys);
  const std::vector<uint16_t> q = halves(numbers, queries * width), k = halves(numbers, keys * width),
                              v = halves(numbers, keys * width);
  std::vector<uint16_t> out(queries * width);
  std::vector<float> lse(queries);
  const float scale = 1.0f / std::sqrt(float(width));
  const auto view = [&](const std::vector<uint16_t>& t) {
    return Heads{reinterpret_cast<const float*>(t.data()), 0, 0, width};
  };
  AttentionForward call{};
  call.problem = {1, 1, 1, queries, keys, width, width, view(q), view(k), view(v), scale, causal, keys - queries,
                  nullptr, 0, {}};
  call.problem.half = true;
  call.out = {reinterpret_cast<float*>(out.data()), 0, 0, width};
  call.lse = lse.data();
  attention_forward(call, 2);
  std::vector<double> exact(queries * width), exact_lse(queries), got;
  for (int64_t i = 0; i < queries; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < (causal ? keys - queries + i + 1 : keys); ++j) {
      double dot = 0.0;
      for (int64_t e = 0; e < width; ++e) dot += widen(q[i * width + e]) * widen(k[j * width + e]);
      const double weight = std::exp(dot * scale);
      sum += weight;
      for (int64_t e = 0; e < width; ++e) exact[i * width + e] += weight * widen(v[j * width + e]);
    }
    exact_lse[i] = std::log(sum);
    for (int64_t e = 0; e < width; ++e) exact[i * width + e] /= sum;
  }
  for (uint16_t half : out) got.push_back(widen(half));
  check_close(got, exact, 8e-3, "attention out");
  check_close(lse, exact_lse, 2e-6, "attention lse");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    if (!multiplies_bfloat16()) {
      bool refused = false;
      try {
        product_rows({}, 1);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      check(refused, "a level without bfloat16 products refuses them");
      return;
    }
    for (bool transposed : {false, true})
      for (int64_t n : {1, 15, 16, 17, 31, 32, 33, 70})
        for (int64_t k : {1, 2, 7, 32, 33, 65}) {
          compare_tile(PairLayout::rows, transposed, n == 70 ? 29 : 14, n, k);
          compare_tile(PairLayout::tile_rows, transposed, n == 70 ? 29 : 13, n, k);
          compare_tile(PairLayout::tile_columns, transposed, n == 70 ? 29 : 15, n, k);
        }
    compare_products(0, 5, 3);
    compare_products(3, 0, 3);
    compare_products(1, 1, 1);
    compare_products(13, 255, 31);
    compare_products(57, 257, 33);
    compare_products(30, 2600, 20);
    for (bool causal : {false, true}) {
      compare_attention(1, 1, 1, causal);
      compare_attention(57, 257, 33, causal);
      compare_attention(255, 600, 64, causal);
    }
  });
}
