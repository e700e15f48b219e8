// Selection of the best entries against a stable sort.
#include <algorithm>
#include <numeric>

#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Rows {
  int64_t batch, length;
  std::vector<float> scores;
  std::vector<int64_t> counts;
  std::vector<uint8_t> valid, always;
  std::vector<int64_t> index, found;

  Rows(int64_t B, int64_t N, int kinds, bool masks) : batch(B), length(N) {
    Numbers numbers(13);
    scores = numbers.normal(B * N);
    for (float& s : scores) {  // few values: many equals
      if (kinds > 0) s = float(numbers.below(kinds)) - float(kinds / 2);
      if (kinds > 0 && s == 0.0f && numbers.below(2)) s = -0.0f;
      if (numbers.below(17) == 0) s = numbers.below(2) ? NAN : -INFINITY;
    }
    for (int64_t b = 0; b < B; ++b) counts.push_back(b == 0 ? 0 : b == 1 ? N + 5 : numbers.below(N + 1));
    for (int64_t n = 0; n < (masks ? B * N : 0); ++n) {
      valid.push_back(numbers.below(4) > 0);
      always.push_back(numbers.below(6) == 0);
    }
  }
  void run() {
    index.assign(batch * length, -7);
    found.assign(batch, -7);
    cuda::token_select({batch, length, scores.data(), counts.data(), valid.empty() ? nullptr : valid.data(),
                        always.empty() ? nullptr : always.data(), index.data(), found.data()},
                       nullptr);
  }
  bool right() const {
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<int64_t> best, chosen;
      for (int64_t n = 0; n < length; ++n) {
        if (!valid.empty() && !valid[b * length + n]) continue;
        (!always.empty() && always[b * length + n] ? chosen : best).push_back(n);
      }
      const auto score = [&](int64_t n) {
        const float s = scores[b * length + n];
        return std::isnan(s) ? -INFINITY : s;
      };
      std::stable_sort(best.begin(), best.end(), [&](int64_t x, int64_t y) { return score(x) > score(y); });
      best.resize(std::min<std::size_t>(best.size(), std::size_t(counts[b])));
      chosen.insert(chosen.end(), best.begin(), best.end());
      std::sort(chosen.begin(), chosen.end());
      if (found[b] != int64_t(chosen.size())) return false;
      chosen.resize(length, -1);
      if (!std::equal(chosen.begin(), chosen.end(), index.begin() + b * length)) return false;
    }
    return true;
  }
};

}  // namespace

int main() {
  return run_emulated([] {
    for (int64_t n : {1, 2, 255, 256, 257, 700})
      for (int kinds : {0, 5})
        for (bool masks : {false, true}) {
          Rows rows(5, n, kinds, masks);
          in_every_mode([&](const std::string& mode) {
            rows.run();
            check(rows.right(), "N" + std::to_string(n) + " kinds" + std::to_string(kinds) + " masks" +
                                    std::to_string(masks) + " " + mode);
          });
        }
    Rows empty(3, 0, 0, false);
    empty.run();
    check(empty.right(), "rows without entries");
    const Rows rows(4, 600, 3, true);
    every_barrier_is_needed("select", [&] {
      Rows r = rows;
      r.run();
      return r.right();
    });
  });
}
