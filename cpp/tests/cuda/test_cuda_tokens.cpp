// Matching, moving and merging tokens against loops written from the definitions, in every order of execution.
#include <stdexcept>

#include "../token_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

constexpr MatchOrder orders[] = {MatchOrder::sources_first, MatchOrder::position, MatchOrder::similarity};

Matched run_match(const Metric& t, int64_t merged, int64_t protect, MatchOrder order) {
  Matched m;
  const TokenMatch call = t.call(merged, protect, order, m);
  std::vector<float> workspace(cuda::token_match_workspace(call) / 4, NAN);
  cuda::token_match(call, workspace.data(), nullptr);
  return m;
}

void match(int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t protect) {
  const Metric t(batch, heads, length, width, 11);
  const int64_t most = std::max<int64_t>(length - protect, 0) / 2;
  for (MatchOrder order : orders)
    for (int64_t merged : {int64_t(0), most / 2, most}) {
      const Matched exact = by_hand(t, merged, protect, order);
      in_every_mode([&](const std::string& mode) {
        check(run_match(t, merged, protect, order) == exact,
              "match N" + std::to_string(length) + " protect" + std::to_string(protect) + " r" +
                  std::to_string(merged) + " order" + std::to_string(int(order)) + " " + mode);
      });
    }
}

// Equal tokens: sources merge by rising index into the first destination. NaN tokens are merged last.
void ties_and_nan() {
  Metric t(1, 1, 9, 3, 1);
  t.values.assign(t.values.size(), 1.0f);
  Matched m = run_match(t, 3, 1, MatchOrder::position);
  check(m.source == std::vector<int64_t>{2, 4, 6} && m.target == std::vector<int64_t>{1, 1, 1} &&
            m.kept == std::vector<int64_t>{0, 1, 3, 5, 7, 8} &&
            m.assign == std::vector<int64_t>{0, 1, 1, 2, 1, 3, 1, 4, 5},
        "ties fall by index");
  std::fill_n(t.values.begin() + 2 * (t.width + t.gap), t.width, NAN);
  m = run_match(t, 3, 1, MatchOrder::sources_first);
  check(m.source == std::vector<int64_t>{4, 6, 8}, "a NaN cosine counts as -inf");
}

void rows(int64_t batch, int64_t from_length, int64_t length, int64_t width) {
  const std::string name = "rows " + std::to_string(from_length) + " " + std::to_string(length) + " " +
                           std::to_string(width);
  for (bool weighted : {true, false}) {
    const TokenRows t(batch, from_length, length, width, weighted);
    std::vector<float> first;
    in_every_mode([&](const std::string& mode) {
      std::vector<float> s(t.sums.size(), NAN), g(t.moved.size(), NAN);
      cuda::token_scatter(t.scatter(s.data()), nullptr);
      cuda::token_gather(t.gather(g.data()), nullptr);
      check_close(s, t.sums, 2e-6, name + " scatter " + mode);
      check_close(g, t.moved, 1e-7, name + " gather " + mode);
      if (first.empty()) first = s;
      check(same_bits(s, first), name + ": bits depend on the order of execution");
    });
  }
}

template <class T>
void gather_of_any_type() {
  const int64_t width = 37, from_length = 5, length = 9;
  std::vector<T> from(from_length * width), to(length * width, T(77));
  for (std::size_t at = 0; at < from.size(); ++at) from[at] = T(at * 2654435761u);
  const std::vector<int64_t> index = {4, -1, 0, 0, 3, 2, 1, -1, 4};
  cuda::token_gather({1, from_length, length, width, from.data(), from_length * width, width, sizeof(T), index.data(),
                      nullptr, to.data()},
                     nullptr);
  bool right = true;
  for (int64_t k = 0; k < length; ++k)
    for (int64_t e = 0; e < width; ++e)
      right = right && to[k * width + e] == (index[k] < 0 ? T(0) : from[index[k] * width + e]);
  check(right, "gather of elements of " + std::to_string(sizeof(T)) + " bytes");
}

// A merge keeps the sum of size times row, and the sizes.
void merge_conserves() {
  const int64_t N = 130, D = 40, r = 50;
  const Metric t(1, 1, N, D, 3);
  const Matched m = run_match(t, r, 1, MatchOrder::sources_first);
  const std::vector<float> x = Numbers(4).normal(N * D);
  std::vector<float> sizes(N), weights(N), slots(N - r), merged((N - r) * D);
  for (int64_t n = 0; n < N; ++n) sizes[n] = float(1 + n % 3);
  cuda::token_weights({1, N, N - r, m.assign.data(), sizes.data(), true, weights.data(), slots.data()}, nullptr);
  cuda::token_scatter({1, N, N - r, D, x.data(), N * D, D, m.assign.data(), weights.data(), merged.data()}, nullptr);
  std::vector<double> before(D + 1, 0.0);
  std::vector<float> after(D + 1, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    before[D] += sizes[n];
    for (int64_t e = 0; e < D; ++e) before[e] += double(sizes[n]) * x[n * D + e];
  }
  for (int64_t k = 0; k < N - r; ++k) {
    after[D] += slots[k];
    for (int64_t e = 0; e < D; ++e) after[e] += slots[k] * merged[k * D + e];
  }
  check_close(after, before, 1e-5, "core tome: a merge conserves the weighted sum and the sizes");
}

}  // namespace

int main() {
  return run_emulated([] {
    for (int64_t n : {0, 1, 2, 3, 12, 65})
      for (int64_t protect : {0, 1, 2, 3}) match(2, n % 2 ? 1 : 3, n, 17, protect);
    match(1, 1, 257, 70, 1);  // three tiles of sources, two slices of the width
    match(1, 2, 130, 5, 0);
    match(0, 1, 9, 4, 1);
    match(1, 1, 197, 8, 150);  // whole tiles of protected destinations
    ties_and_nan();
    for (int64_t width : {0, 1, 31, 33, 300}) rows(2, 41, 20, width);
    rows(2, 0, 5, 8);
    rows(1, 256, 1, 16);
    gather_of_any_type<uint8_t>();
    gather_of_any_type<uint16_t>();
    gather_of_any_type<uint64_t>();
    merge_conserves();
    check_token_weights([](const TokenWeights& call) { cuda::token_weights(call, nullptr); });
    check_refused("too many merges", [] { run_match(Metric(1, 1, 5, 4, 1), 3, 0, MatchOrder::position); });
    check_refused("a negative size", [] {
      cuda::token_weights({1, -1, 1, nullptr, nullptr, true, nullptr, nullptr}, nullptr);
    });
    check_refused("elements of 3 bytes", [] {
      cuda::token_gather({1, 1, 1, 1, nullptr, 1, 1, 3, nullptr, nullptr, nullptr}, nullptr);
    });
    const Metric t(1, 2, 140, 70, 7);
    const Matched exact = by_hand(t, 60, 1, MatchOrder::similarity);
    every_barrier_is_needed("match", [&] { return run_match(t, 60, 1, MatchOrder::similarity) == exact; });
  });
}
