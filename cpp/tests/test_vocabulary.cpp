// Vocabulary losses of a chunk of logits against float64.
#include <algorithm>
#include <stdexcept>

#include "check.hpp"
#include "vlm/float_products.hpp"
#include "vlm/vocabulary.hpp"
#include "vocabulary_oracle.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct CrossEntropyCase {
  int64_t rows, ids, stride;
  float smoothing, z_loss, softcap;
  std::vector<float> chunk, bias, factors, loss, log_p, lse;
  std::vector<int64_t> labels;

  CrossEntropyCase(int64_t R, int64_t V, bool with_bias, float smoothing_, float z_loss_, float cap)
      : rows(R), ids(V), stride(V + 3), smoothing(smoothing_), z_loss(z_loss_), softcap(cap) {
    Numbers numbers(7);
    chunk = numbers.normal(R * stride, 3.0f);
    if (with_bias) bias = numbers.normal(V);
    factors = numbers.normal(R);
    for (int64_t i = 0; i < R; ++i) labels.push_back(i % 5 == 4 ? -1 : numbers.below(V));
    for (std::vector<float>* values : {&loss, &log_p, &lse}) values->resize(R);
  }
  CrossEntropyRows call(bool gradient) {
    return {rows, ids, {chunk.data(), stride}, bias.empty() ? nullptr : bias.data(), labels.data(),
            factors.data(), smoothing, z_loss, softcap, gradient, loss.data(), log_p.data(), lse.data()};
  }
  void run(bool gradient, int threads) { cross_entropy_rows(call(gradient), threads); }
};

void compare(CrossEntropyCase given) {
  const std::string name = "cross-entropy R" + std::to_string(given.rows) + " V" + std::to_string(given.ids) + " cap" +
                           std::to_string(given.softcap);
  const int64_t R = given.rows;
  std::vector<double> loss(R), log_p(R), lse(R);
  std::vector<double> gradient(given.chunk.begin(), given.chunk.end());
  for (int64_t i = 0; i < R; ++i) {
    const CrossEntropyRow row = cross_entropy_oracle(given.call(false), given.chunk.data() + i * given.stride, i);
    lse[i] = row.lse;
    log_p[i] = row.log_p;
    loss[i] = row.loss;
    std::copy(row.gradient.begin(), row.gradient.end(), gradient.begin() + i * given.stride);
  }
  CrossEntropyCase plain = given, full = given;
  plain.run(false, 1);
  full.run(true, 1);
  check_close(full.loss, loss, 1e-6, name + " loss");
  check_close(full.log_p, log_p, 1e-6, name + " log p");
  check_close(full.lse, lse, 1e-6, name + " lse");
  check_close(full.chunk, gradient, 2e-6, name + " gradient (and the gaps between rows)");
  check_close(plain.loss, loss, 1e-6, name + " loss without gradient");
  for (int threads : {2, 5}) {
    CrossEntropyCase other = given;
    other.run(true, threads);
    check(same_bits(full.chunk, other.chunk) && same_bits(full.loss, other.loss), name + ": bits differ with threads");
  }
}

struct DivergenceCase {
  int64_t rows, ids, stride;
  std::vector<float> student, teacher, factors, value;

  DivergenceCase(int64_t R, int64_t V) : rows(R), ids(V), stride(V + 2), value(R) {
    Numbers numbers(9);
    student = numbers.normal(R * stride, 2.0f);
    teacher = numbers.normal(R * stride, 2.0f);
    factors = numbers.normal(R);
    for (int64_t i = 0; i + 1 < R; i += 2) {  // ids that one side lacks
      student[i * stride + (i * 7) % V] = -INFINITY;
      teacher[i * stride + (i * 5 + 1) % V] = -INFINITY;
    }
    if (R > 2) std::fill_n(teacher.begin() + 2 * stride, V, -INFINITY);
  }
  void run(Divergence kind, bool gradient, int threads) {
    divergence_rows({rows, ids, {student.data(), stride}, {teacher.data(), stride}, factors.data(), kind, 1.7f, 0.3f,
                     gradient, value.data()}, threads);
  }
};

void compare(Divergence kind, int64_t R, int64_t V) {
  const std::string name = "divergence " + std::to_string(int(kind)) + " R" + std::to_string(R) +
                           " V" + std::to_string(V);
  const DivergenceCase given(R, V);
  DivergenceCase full = given, plain = given, other = given;
  full.run(kind, true, 1);
  plain.run(kind, false, 1);
  other.run(kind, true, 5);
  std::vector<double> value(R), gradient(R * V), got(R * V);
  for (int64_t i = 0; i < R; ++i) {
    std::vector<double> s(given.student.begin() + i * given.stride, given.student.begin() + i * given.stride + V);
    std::vector<double> t(given.teacher.begin() + i * given.stride, given.teacher.begin() + i * given.stride + V);
    value[i] = divergence_oracle(kind, s, t, 1.7f, 0.3f);
    for (int64_t v = 0; v < V; ++v) {
      got[i * V + v] = full.student[i * full.stride + v];
      if (std::isinf(s[v]) || std::isinf(t[v])) continue;
      const double at = s[v], step = 1e-5;
      s[v] = at + step;
      const double above = divergence_oracle(kind, s, t, 1.7f, 0.3f);
      s[v] = at - step;
      gradient[i * V + v] = given.factors[i] * (above - divergence_oracle(kind, s, t, 1.7f, 0.3f)) / (2 * step);
      s[v] = at;
    }
  }
  check_close(full.value, value, 2e-6, name + " value");
  check_close(plain.value, value, 2e-6, name + " value without gradient");
  check_close(got, gradient, 3e-6, name + " gradient");
  check(same_bits(full.student, other.student) && same_bits(full.value, other.value),
        name + ": bits differ with threads");
}

void nothing_to_choose() {
  std::vector<float> chunk(2 * 5, -INFINITY), loss(2), log_p(2), lse(2);
  const std::vector<int64_t> labels{1, -1};
  for (int v = 0; v < 5; ++v) chunk[5 + v] = 1.0f;
  cross_entropy_rows({2, 5, {chunk.data(), 5}, nullptr, labels.data(), nullptr, 0.0f, 0.0f, 0.0f, true, loss.data(),
                      log_p.data(), lse.data()}, 1);
  check(std::isinf(loss[0]) && lse[0] == -INFINITY && log_p[0] == -INFINITY, "a row of -inf has no probability");
  for (int v = 0; v < 5; ++v) check(chunk[v] == 0.0f && std::fabs(chunk[5 + v] - 0.2f) < 1e-6f, "and no gradient");
}

// A label that cannot be chosen costs inf, with smoothing too; without a label a row has no log p, even if it is empty.
void rows_of_no_probability() {
  std::vector<float> chunk{-INFINITY, 1.0f, 2.0f, -INFINITY, -INFINITY, -INFINITY}, loss(2), log_p(2), lse(2);
  const std::vector<int64_t> labels{0, -1};
  cross_entropy_rows({2, 3, {chunk.data(), 3}, nullptr, labels.data(), nullptr, 0.1f, 0.0f, 0.0f, false, loss.data(),
                      log_p.data(), lse.data()}, 1);
  check(loss[0] == INFINITY && log_p[0] == -INFINITY, "a label of -inf under smoothing");
  check(loss[1] == INFINITY && log_p[1] == 0.0f, "no label in a row of -inf");
}

void bad_calls_are_refused() {
  std::vector<float> chunk(4), out(3);
  std::vector<int64_t> labels{4};
  CrossEntropyRows call{1, 4, {chunk.data(), 4}, nullptr, labels.data(), nullptr, 0.0f, 0.0f, 0.0f, false,
                        out.data(), out.data() + 1, out.data() + 2};
  const auto refused = [&](auto run) {
    try {
      run();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  check(refused([&] { cross_entropy_rows(call, 1); }), "a label beyond the vocabulary");
  check(refused([] { product_rows(FloatProduct{-1, 1, 1, {}, {}, {}}, 1); }), "a negative number of rows of a product");
  labels[0] = 0;
  call.smoothing = 1.0f;
  check(refused([&] { cross_entropy_rows(call, 1); }), "smoothing of one");
  const DivergenceRows pair{1, 4, {chunk.data(), 4}, {chunk.data(), 4}, nullptr, Divergence::js, 1.0f, 1.0f,
                            false, out.data()};
  check(refused([&] { divergence_rows(pair, 1); }), "a mixture of one");
  DivergenceRows other = pair;
  other.kind = static_cast<Divergence>(6);
  check(refused([&] { divergence_rows(other, 1); }), "an unknown kind");
}

void compare_products(int64_t rows, int64_t ids, int64_t width) {
  const std::string name = "products " + std::to_string(rows) + "x" + std::to_string(ids) + "x" + std::to_string(width);
  Numbers numbers(rows + ids + width);
  const int64_t stride = width + 3, z_stride = ids + 2;
  const std::vector<float> h = numbers.normal(rows * stride), w = numbers.normal(ids * stride),
                           g = numbers.normal(rows * ids), start = numbers.normal(ids * stride);
  struct Results {
    std::vector<float> z, dh, dw;
  };
  const auto run = [&](int threads) {
    Results r{std::vector<float>(rows * z_stride, 7.0f), std::vector<float>(rows * width), start};
    product_rows(FloatProduct{rows, ids, width, {h.data(), stride}, {w.data(), stride}, {r.z.data(), z_stride}},
                 threads);
    product_gradients(FloatProductGradients{rows, ids, width, {h.data(), stride}, {w.data(), stride}, {g.data(), ids},
                                            {r.dh.data(), width}, {r.dw.data(), stride}}, threads);
    return r;
  };
  const Results one = run(1);
  std::vector<double> z(rows * z_stride, 7.0), dh(rows * width), dw(start.begin(), start.end());  // gaps stay
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t v = 0; v < ids; ++v) {
      z[i * z_stride + v] = 0.0;
      for (int64_t e = 0; e < width; ++e) {
        z[i * z_stride + v] += double(h[i * stride + e]) * w[v * stride + e];
        dh[i * width + e] += double(g[i * ids + v]) * w[v * stride + e];
        dw[v * stride + e] += double(g[i * ids + v]) * h[i * stride + e];
      }
    }
  check_close(one.z, z, 2e-6, name + " z");
  check_close(one.dh, dh, 2e-6, name + " dh");
  check_close(one.dw, dw, 2e-6, name + " dw");
  for (int threads : {2, 5}) {
    const Results other = run(threads);
    check(same_bits(one.z, other.z) && same_bits(one.dh, other.dh) && same_bits(one.dw, other.dw), name + ": threads");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (int64_t V : {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 127, 1023, 1024, 1025, 1031, 5003}) {
      compare(CrossEntropyCase(7, V, false, 0.0f, 0.0f, 0.0f));
      compare(CrossEntropyCase(6, V, true, 0.1f, 1e-3f, 0.0f));
      compare(CrossEntropyCase(6, V, V % 2 == 0, 0.1f, 1e-3f, 5.0f));
    }
    compare(CrossEntropyCase(0, 5, true, 0.0f, 0.0f, 0.0f));
    for (int kind = 0; kind < 6; ++kind)
      for (int64_t V : {2, 4, 15, 16, 17, 1025}) compare(static_cast<Divergence>(kind), 5, V);
    compare(Divergence::forward, 0, 3);
    nothing_to_choose();
    rows_of_no_probability();
    bad_calls_are_refused();
    for (int64_t rows : {0, 1, 13, 15, 257})
      for (int64_t ids : {1, 255, 257, 2311}) compare_products(rows, ids, rows == 13 ? 129 : 33);
    compare_products(3, 5, 0);
  });
}
