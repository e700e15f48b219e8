// Token reduction against loops written from the definitions.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "token_oracle.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

Matched run_match(const Metric& t, int64_t merged, int64_t protect, MatchOrder order, int threads) {
  Matched m;
  token_match(t.call(merged, protect, order, m), threads);
  return m;
}

void match(int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t protect) {
  const Metric t(batch, heads, length, width, 11);
  const int64_t most = std::max<int64_t>(length - protect, 0) / 2;
  for (MatchOrder order : {MatchOrder::sources_first, MatchOrder::position, MatchOrder::similarity})
    for (int64_t merged : {int64_t(0), most / 2, most}) {
      const std::string name = "match N" + std::to_string(length) + " protect" + std::to_string(protect) + " r" +
                               std::to_string(merged) + " order" + std::to_string(int(order));
      const Matched got = run_match(t, merged, protect, order, 1);
      check(got == by_hand(t, merged, protect, order), name);
      for (int threads : {2, 5}) check(got == run_match(t, merged, protect, order, threads), name + " threads");
    }
}

void rows(int64_t batch, int64_t from_length, int64_t length, int64_t width) {
  const std::string name = "rows " + std::to_string(from_length) + " " + std::to_string(length) + " " +
                           std::to_string(width);
  for (bool weighted : {true, false}) {
    const TokenRows t(batch, from_length, length, width, weighted);
    std::vector<float> first_sums, first_moved;
    for (int threads : {1, 2, 5}) {
      std::vector<float> s(t.sums.size()), g(t.moved.size());
      token_scatter(t.scatter(s.data()), threads);
      token_gather(t.gather(g.data()), threads);
      if (threads == 1) {
        check_close(s, t.sums, 2e-6, name + " scatter");
        check_close(g, t.moved, 1e-7, name + " gather");
        first_sums = s;
        first_moved = g;
      }
      check(same_bits(s, first_sums) && same_bits(g, first_moved), name + ": bits differ");
    }
  }
}

void select() {
  for (int64_t n : {0, 1, 2, 15, 16, 17, 700})
    for (int kinds : {0, 5})
      for (bool masks : {false, true})
        for (int threads : {1, 3}) {
          SelectRows rows(5, n, kinds, masks);
          token_select(rows.call(), threads);
          check(rows.right(), "select N" + std::to_string(n) + " kinds" + std::to_string(kinds));
        }
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = INFINITY;
  const std::vector<float> scores = {1, 3, nan, 3, -0.0f, 0.0f, -inf, inf};
  const std::vector<uint8_t> valid = {1, 1, 1, 1, 1, 1, 1, 0}, always = {0, 0, 0, 0, 0, 0, 0, 0};
  const std::vector<std::vector<int64_t>> expected = {
      {}, {1}, {1, 3}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 3, 4, 5}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 6}};
  for (int64_t k = -1; k < 12; ++k) {
    std::vector<int64_t> index(8), found(1);
    token_select({1, 8, scores.data(), &k, valid.data(), always.data(), index.data(), found.data()}, 2);
    std::vector<int64_t> want = expected[std::clamp<int64_t>(k, 0, 7)];
    check(found[0] == int64_t(want.size()), "select count " + std::to_string(k));
    want.resize(8, -1);
    check(index == want, "select " + std::to_string(k));
  }
  const std::vector<uint8_t> guarded = {0, 0, 1, 0, 0, 0, 1, 1};
  std::vector<int64_t> index(8), found(1);
  const int64_t two = 2;
  token_select({1, 8, scores.data(), &two, valid.data(), guarded.data(), index.data(), found.data()}, 1);
  check(index == std::vector<int64_t>{1, 2, 3, 6, -1, -1, -1, -1}, "select: protected besides, not valid never");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (int64_t n : {0, 1, 2, 3, 11, 12, 27, 28, 29, 64, 113, 197})
      for (int64_t protect : {0, 1, 2, 3}) match(2, n % 2 ? 1 : 3, n, 17, protect);
    match(1, 1, 1033, 24, 1);  // more destinations than a tile
    match(0, 1, 9, 4, 1);
    for (int64_t width : {0, 1, 15, 16, 17, 700}) rows(3, 41, 20, width);
    rows(2, 0, 5, 8);
    rows(2, 300, 1, 400);
    select();
    check_token_weights([](const TokenWeights& call) { token_weights(call); });
    const std::vector<int64_t> outside = {2}, none = {-1};
    const std::vector<float> one = {1.0f};
    std::vector<float> out(2);
    check_refused("an index beyond the slots", [&] {
      token_scatter({1, 1, 2, 1, one.data(), 1, 1, outside.data(), nullptr, out.data()}, 1);
    });
    check_refused("an index beyond the rows", [&] {
      token_gather({1, 1, 1, 1, one.data(), 1, 1, 4, outside.data(), nullptr, out.data()}, 1);
    });
    check_refused("elements of no byte", [&] {
      token_gather({1, 1, 1, 1, one.data(), 1, 1, 0, none.data(), nullptr, out.data()}, 1);
    });
    check_refused("an unknown order", [&] { run_match(Metric(1, 1, 5, 4, 1), 1, 0, static_cast<MatchOrder>(3), 1); });
    check_refused("too many merges", [&] { run_match(Metric(1, 1, 5, 4, 1), 3, 0, MatchOrder::position, 1); });
    check_refused("a negative size", [&] { token_weights({1, -1, 1, nullptr, nullptr, true, nullptr, nullptr}); });
  });
}
