// The CUDA attention kernels against a float64 oracle that holds every score, in every order of execution.
#include "emulated_attention.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

void compare(const AttentionCase& c) {
  AttentionTensors t(c), first(c);
  const AttentionOracle o = oracle(t);
  run_attention(first);
  in_every_mode([&](const std::string& mode) {
    run_attention(t);
    const std::string name = c.name() + " " + mode;
    check_close_to(t, o, name);
    check_close(t.sums, o.sums, 5e-6, name + " column sums");
    check(same_results(t, first) && same_bits(t.sums, first.sums), name + ": bits depend on the order of execution");
  });
}

}  // namespace

int main() {
  return run_emulated([] {
    compare({1, 1, 1, 1, 1, 1, 1, false, 0, 0, 0});
    compare({2, 1, 1, 0, 3, 4, 4, false, 0, 0, 8});
    compare({2, 1, 1, 3, 0, 4, 4, false, 0, 0, 0});
    compare({0, 1, 1, 3, 3, 4, 4, false, 0, 0, 0});
    compare({1, 1, 1, 3, 5, 0, 4, false, 0, 0, 0});
    // Around the borders of tiles: 32 and 64 rows, 64 columns; all three instances.
    for (int64_t n : {31, 33, 63, 64, 65})
      compare({1, 2, 1, n, n + 1, 17, 9, n % 2 == 1, 1, int(n % 2), n % 3 ? 15 : 0});
    compare({1, 2, 2, 29, 97, 64, 33, true, 97 - 29, 1, 0});
    compare({1, 1, 1, 65, 33, 66, 128, true, 0, 1, 12});
    compare({1, 2, 1, 33, 65, 256, 130, true, 32, 1, 14});
    for (int bias : {8, 9, 10, 13}) compare({2, 2, 1, 35, 66, 16, 16, bias % 2 == 0, 31, bias % 4, bias});
    compare({1, 1, 1, 20, 200, 8, 8, false, 0, 3, 12});
    compare({1, 2, 2, 70, 40, 12, 12, true, -30, 0, 0});  // bottom-right with fewer keys: empty rows
    // Enough tiles that every barrier matters.
    const AttentionTensors small(AttentionCase{1, 2, 1, 130, 130, 8, 8, true, 0, 3, 8 + 2});
    const AttentionOracle exact = oracle(small);
    every_barrier_is_needed("attention", [&] {
      AttentionTensors t = small;
      run_attention(t);
      return close(t, exact);
    });
  });
}
