// Cross-entropy fused with its linear map against float64, in every order of execution.
#include <stdexcept>

#include "../vocabulary_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t rows, ids, width;
  bool bias;
  float smoothing, z_loss, softcap;
  std::string name() const {
    return "R" + std::to_string(rows) + " V" + std::to_string(ids) + " E" + std::to_string(width) + " smoothing" +
           std::to_string(smoothing) + " cap" + std::to_string(softcap);
  }
};

struct Answer : CrossEntropyAnswer {
  std::vector<double> dhidden, dweight, dbias;
};

struct Tensors {
  Case c;
  static constexpr int64_t gap = 3;
  std::vector<float> hidden, weight, bias, factors;
  std::vector<int64_t> labels;
  std::vector<float> loss, log_p, lse, dhidden, dweight, dbias;

  explicit Tensors(const Case& c_) : c(c_) {
    Numbers numbers(17);
    hidden = numbers.normal(c.rows * (c.width + gap));
    weight = numbers.normal(c.ids * (c.width + gap));
    if (c.bias) bias = numbers.normal(c.ids);
    factors = numbers.normal(c.rows);
    for (int64_t i = 0; i < c.rows; ++i) labels.push_back(i % 5 == 4 ? -1 : i == 1 ? c.ids - 1 : numbers.below(c.ids));
  }
  Answer solve() const {
    const int64_t stride = c.width + gap;
    Answer a{cross_entropy_oracle({c.rows, c.ids, bias.empty() ? nullptr : bias.data(), labels.data(), factors.data(),
                                   c.smoothing, c.z_loss, c.softcap},
                                  [&](int64_t i, int64_t v) {
                                    double dot = 0.0;
                                    for (int64_t e = 0; e < c.width; ++e)
                                      dot += double(hidden[i * stride + e]) * weight[v * stride + e];
                                    return dot;
                                  }),
             std::vector<double>(c.rows * c.width), std::vector<double>(c.ids * c.width), std::vector<double>(c.ids)};
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t v = 0; v < c.ids; ++v) {
        const double g = a.gradient[i * c.ids + v];
        a.dbias[v] += g;
        for (int64_t e = 0; e < c.width; ++e) {
          a.dhidden[i * c.width + e] += g * weight[v * stride + e];
          a.dweight[v * c.width + e] += g * hidden[i * stride + e];
        }
      }
    return a;
  }
  cuda::VocabularyProblem problem() const {
    return {c.rows, c.ids, c.width, {hidden.data(), c.width + gap}, {weight.data(), c.width + gap},
            bias.empty() ? nullptr : bias.data(), labels.data(), c.smoothing, c.z_loss, c.softcap};
  }
  void run() {
    for (std::vector<float>* t : {&loss, &log_p, &lse}) t->assign(c.rows, NAN);
    dhidden.assign(c.rows * c.width, NAN);
    dweight.assign(c.ids * c.width, NAN);
    dbias.assign(c.ids, NAN);
    std::vector<float> workspace(cuda::vocabulary_workspace(problem()) / 4, NAN);
    cuda::vocabulary_forward({problem(), loss.data(), log_p.data(), lse.data()}, workspace.data(), nullptr);
    cuda::vocabulary_backward({problem(), lse.data(), factors.data(), {dhidden.data(), c.width},
                               {dweight.data(), c.width}, dbias.data()},
                              nullptr);
  }
};

bool close(const Tensors& t, const Answer& a) {
  return error_between(t.loss, a.loss) <= 2e-6 && error_between(t.log_p, a.log_p) <= 2e-6 &&
         error_between(t.lse, a.lse) <= 2e-6 && error_between(t.dhidden, a.dhidden) <= 5e-6 &&
         error_between(t.dweight, a.dweight) <= 5e-6 && error_between(t.dbias, a.dbias) <= 5e-6;
}

void compare(const Case& c) {
  Tensors t(c), first(c);
  const Answer a = t.solve();
  first.run();
  in_every_mode([&](const std::string& mode) {
    t.run();
    const std::string name = c.name() + " " + mode;
    check_close(t.loss, a.loss, 2e-6, name + " loss");
    check_close(t.log_p, a.log_p, 2e-6, name + " log p");
    check_close(t.lse, a.lse, 2e-6, name + " lse");
    check_close(t.dhidden, a.dhidden, 5e-6, name + " dhidden");
    check_close(t.dweight, a.dweight, 5e-6, name + " dweight");
    check_close(t.dbias, a.dbias, 5e-6, name + " dbias");
    check(same_bits(t.loss, first.loss) && same_bits(t.dhidden, first.dhidden) && same_bits(t.dweight, first.dweight) &&
              same_bits(t.dbias, first.dbias),
          name + ": bits depend on the order of execution");
  });
}

// What is not wanted is not written, and what is left has the same bits.
void a_part_of_the_gradients() {
  Tensors whole(Case{20, 70, 9, true, 0.1f, 0.0f, 0.0f}), part = whole;
  whole.run();
  part.run();
  part.dbias.assign(70, NAN);
  cuda::vocabulary_backward({part.problem(), part.lse.data(), part.factors.data(), {nullptr, 0}, {nullptr, 0},
                             part.dbias.data()},
                            nullptr);
  check(same_bits(part.dbias, whole.dbias), "the gradient of the bias alone");
}

void nothing_to_choose() {
  Tensors t(Case{7, 3, 4, true, 0.0f, 0.0f, 0.0f});
  t.bias.assign(3, -INFINITY);
  t.run();
  for (int i = 0; i < 7; ++i)
    check(t.loss[i] == INFINITY && t.lse[i] == -INFINITY && t.log_p[i] == -INFINITY, "a row of -inf");
  for (float g : t.dhidden) check(g == 0.0f, "and no gradient");
}

void bad_calls_are_refused() {
  for (float smoothing : {-0.1f, 1.0f}) {
    bool refused = false;
    try {
      Tensors(Case{2, 3, 4, false, smoothing, 0.0f, 0.0f}).run();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "a smoothing outside of [0, 1)");
  }
}

}  // namespace

int main() {
  return run_emulated([] {
    compare({1, 1, 1, false, 0.0f, 0.0f, 0.0f});
    compare({0, 5, 3, true, 0.0f, 0.0f, 0.0f});
    compare({3, 5, 0, true, 0.0f, 0.0f, 0.0f});
    for (int64_t n : {63, 64, 65}) compare({n, 130 - n, 17, n % 2 == 1, 0.1f, 1e-3f, n == 64 ? 5.0f : 0.0f});
    compare({6, 1100, 8, true, 0.0f, 0.0f, 0.0f});      // two chunks of ids
    compare({5, 7, 300, true, 0.05f, 1e-2f, 0.0f});     // the wide instance, and a second slab below
    compare({66, 70, 520, false, 0.0f, 0.0f, 10.0f});
    a_part_of_the_gradients();
    nothing_to_choose();
    bad_calls_are_refused();
    const Tensors small(Case{70, 140, 70, true, 0.1f, 1e-3f, 0.0f});
    const Answer exact = small.solve();
    every_barrier_is_needed("vocabulary", [&] {
      Tensors t = small;
      t.run();
      return close(t, exact);
    });
  });
}
