// Exact attention against a float64 oracle that holds every score.
#include <stdexcept>

#include "attention_case.hpp"
#include "vlm/attention.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

void run_attention(AttentionTensors& t, int threads) {
  attention_forward(t.forward(), threads);
  attention_backward(t.backward(), threads);
}

void compare(const AttentionCase& c) {
  AttentionTensors t(c);
  run_attention(t, 1);
  check_close_to(t, attention_oracle(t.backward()), c.name());
  for (int threads : {2, 5}) {
    AttentionTensors other(c);
    run_attention(other, threads);
    check(same_results(t, other), c.name() + ": bits differ with " + std::to_string(threads) + " threads");
  }
}

// Temperatures that lie apart, are shared, or are 0: the gradient of each is that of its own head.
void temperatures(int64_t stride) {
  AttentionTensors t({2, 4, 2, 21, 33, 12, 8, true, 12, 1, 0});
  const std::vector<float> temperature{0.0f, 5.0f, -1.5f, 5.0f, 0.7f, 5.0f, 2.0f};
  std::vector<float> gradient(stride == 0 ? 1 : 4);
  AttentionBackward call = t.backward();
  call.problem.temperature = temperature.data() + (stride == 0 ? 2 : 0);
  call.problem.temperature_stride = stride;
  call.dtemperature = gradient.data();
  attention_forward({call.problem, AttentionTensors::plain<MutableHeads>(t.out, 4, 21, 8), t.lse.data()}, 1);
  attention_backward(call, 2);
  const AttentionAnswer o = attention_oracle(call);
  check_close(t.out, o.out, 2e-6, "temperature out");
  check_close(t.dq, o.dq, 1e-5, "temperature dq");
  check_close(t.dk, o.dk, 1e-5, "temperature dk");
  check_close(gradient, o.dtemperature, 1e-5, "temperature gradient, stride " + std::to_string(stride));
}

// An offset at the end of its range sees all keys, or none.
void far_offsets() {
  for (int64_t offset : {INT64_MAX, INT64_MIN, int64_t(INT32_MAX), int64_t(INT32_MIN)})
    compare({1, 2, 1, 8, 17, 4, 4, true, offset, 0, 0});
}

void what_does_not_fit_is_refused() {
  AttentionTensors t({1, 2, 1, 4, 6, 3, 3, false, 0, 0, 0});
  const auto refused = [&](const char* what, auto spoil) {
    AttentionProblem p = t.problem();
    spoil(p);
    try {
      attention_forward({p, AttentionTensors::plain<MutableHeads>(t.out, 2, 4, 3), t.lse.data()}, 1);
      check(false, std::string(what) + " was taken");
    } catch (const std::invalid_argument&) {
    }
  };
  refused("a negative width", [](AttentionProblem& p) { p.width = -1; });
  refused("3 query heads of 2", [](AttentionProblem& p) { p.query_heads = 3, p.key_heads = 2; });
  refused("a cap that is not a number", [](AttentionProblem& p) { p.softcap = NAN; });
  refused("a share that is not a number", [](AttentionProblem& p) { p.keep_share = NAN; });
  refused("more keys than int32 counts", [](AttentionProblem& p) { p.batch = 0, p.keys = int64_t(1) << 31; });
  const float table[1] = {0.0f};
  refused("a grid whose product wraps around", [&](AttentionProblem& p) {
    p.relative = table, p.keys = 4, p.grid_columns = 4, p.grid_rows = (int64_t(1) << 62) + 1;
  });
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    // Sizes around the tile borders of all levels: rows 6, 14, 48, 56, 96, 112; vectors 4, 8, 16; keys 256.
    compare({1, 1, 1, 1, 1, 1, 1, false, 0, 0, 0});
    compare({2, 1, 1, 0, 3, 4, 4, false, 0, 0, 0});
    compare({2, 1, 1, 3, 0, 4, 4, false, 0, 0, 0});
    compare({0, 1, 1, 3, 3, 4, 4, false, 0, 0, 0});
    for (int64_t n : {5, 6, 7, 13, 14, 15, 47, 48, 49, 55, 57, 97, 111, 113})
      compare({1, 2, 1, n, n + 1, 17, 9, n % 2 == 0, n % 3 == 0 ? 1 : 0, int(n % 2), n % 3 == 1 ? 15 : 0});
    for (int64_t m : {31, 32, 33, 255, 256, 257, 521}) compare({1, 2, 2, 29, m, 16, 33, m % 2 == 1, m - 29, 1, 0});
    for (int mask : {0, 1, 2})
      for (int bias : {0, 8, 9, 10, 12, 13, 14, 15})
        for (bool causal : {false, true}) compare({3, 4, 2, 59, 261, 16, 16, causal, 202, mask, bias});
    compare({1, 2, 2, 130, 70, 32, 32, true, -60, 0, 0});  // bottom-right with fewer keys: empty rows
    compare({2, 16, 16, 120, 120, 64, 64, true, 0, 1, 0});  // many heads: one chunk of keys each
    compare({1, 3, 3, 20, 1100, 8, 8, false, 0, 1, 15});    // several chunks of keys
    for (int64_t stride : {0, 1, 2}) temperatures(stride);
    far_offsets();
    what_does_not_fit_is_refused();
  });
}
