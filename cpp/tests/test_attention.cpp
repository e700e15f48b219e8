// Exact attention against a float64 oracle that holds every score.
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
  });
}
