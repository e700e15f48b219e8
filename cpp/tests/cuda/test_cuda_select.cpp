// Selection of the best entries against a stable sort.
#include "../token_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

int main() {
  return run_emulated([] {
    for (int64_t n : {1, 2, 255, 256, 257, 700})
      for (int kinds : {0, 5})
        for (bool masks : {false, true}) {
          SelectRows rows(5, n, kinds, masks);
          in_every_mode([&](const std::string& mode) {
            cuda::token_select(rows.call(), nullptr);
            check(rows.right(), "N" + std::to_string(n) + " kinds" + std::to_string(kinds) + " masks" +
                                    std::to_string(masks) + " " + mode);
          });
        }
    SelectRows empty(3, 0, 0, false);
    cuda::token_select(empty.call(), nullptr);
    check(empty.right(), "rows without entries");
    const SelectRows rows(4, 600, 3, true);
    every_barrier_is_needed("select", [&] {
      SelectRows r = rows;
      cuda::token_select(r.call(), nullptr);
      return r.right();
    });
  });
}
