// Mask atoms of every kind, each with a predicate written from its definition, for 2 sequences and 2 heads.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "check.hpp"
#include "vlm/mask.hpp"

namespace vlm::test {

constexpr int64_t batch = 2, heads = 2;

using Predicate = std::function<bool(int64_t b, int64_t h, int64_t i, int64_t j)>;

struct Made {
  std::string name;
  MaskAtom atom;
  Predicate allow;
  bool local = false;
};

// Arrays that the atoms point to, alive for one case.
struct Arrays {
  std::deque<std::vector<int32_t>> ints;
  std::deque<std::vector<uint8_t>> bytes;
  const int32_t* keep(std::vector<int32_t> values) {
    ints.push_back(std::move(values));
    return ints.back().data();
  }
};

inline std::vector<int32_t> ids(Numbers& numbers, int64_t length, int64_t names, bool scattered) {
  std::vector<int32_t> values(length);
  for (int32_t& id : values) id = static_cast<int32_t>(numbers.below(names));
  if (!scattered) std::sort(values.begin(), values.end());
  return values;
}

inline std::vector<int32_t> ids_of_batch(Numbers& numbers, int64_t length, int64_t names, bool scattered) {
  std::vector<int32_t> all;
  for (int64_t b = 0; b < batch; ++b)
    for (int32_t id : ids(numbers, length, names, scattered)) all.push_back(id);
  return all;
}

inline MaskAtom plain(AtomKind kind, int64_t a, int64_t b, int64_t c) {
  return {kind, {a, b, c, 0}, nullptr, 0, 0, 0, nullptr, 0, 0};
}

inline std::vector<Made> atoms(Numbers& r, Arrays& arrays, int64_t n, int64_t m) {
  std::vector<Made> made;
  const int64_t offset = m - n + r.below(5) - 2, size = 1 + r.below(m), sinks = r.below(m / 2 + 1);
  made.push_back({"causal", plain(AtomKind::band, offset, INT32_MAX, 0),
                  [=](int64_t, int64_t, int64_t i, int64_t j) { return i + offset >= j; }});
  made.push_back({"window", plain(AtomKind::local_band, offset, size, sinks),
                  [=](int64_t, int64_t, int64_t i, int64_t j) {
                    return i + offset - j <= size && j - i - offset <= sinks;
                  },
                  true});
  made.push_back({"block causal", plain(AtomKind::block_causal, m - n + 3, size, 0),
                  [=](int64_t, int64_t, int64_t i, int64_t j) {
                    return i + m - n + 3 >= 0 && (i + m - n + 3) / size >= j / size;
                  }});
  made.push_back({"lambda", plain(AtomKind::lambda, offset, size, sinks),
                  [=](int64_t, int64_t, int64_t i, int64_t j) {
                    const int64_t d = i + offset - j;
                    return d >= 0 && (d < size || j < sinks);
                  }, true});
  const int32_t* prefixes = arrays.keep(ids(r, batch, m + 1, true));
  MaskAtom atom = plain(AtomKind::prefix, offset, 0, 0);
  atom.a = prefixes, atom.a_batch = 1;
  made.push_back({"prefix", atom,
                  [=](int64_t b, int64_t, int64_t i, int64_t j) { return j < prefixes[b] || i + offset >= j; }});
  for (bool scattered : {false, true}) {
    const int32_t* q = arrays.keep(ids_of_batch(r, n, 4, scattered));
    const int32_t* k = arrays.keep(ids_of_batch(r, m, 4, scattered));
    const std::string kind = scattered ? " scattered" : " runs";
    const auto pair = [=](MaskAtom t) {
      t.a = q, t.a_batch = n, t.b = k, t.b_batch = m;
      return t;
    };
    made.push_back({"spans" + kind, pair(plain(AtomKind::spans, offset, 0, 0)),
                    [=](int64_t b, int64_t, int64_t i, int64_t j) {
                      return i + offset >= j || q[b * n + i] == k[b * m + j];
                    }});
    made.push_back({"segments" + kind, pair(plain(AtomKind::ids, 0, 0, 0)),
                    [=](int64_t b, int64_t, int64_t i, int64_t j) { return q[b * n + i] == k[b * m + j]; }});
    made.push_back({"facets" + kind, pair(plain(AtomKind::ids, 1, 2, 0)),
                    [=](int64_t b, int64_t, int64_t i, int64_t j) {
                      return q[b * n + i] == k[b * m + j] || k[b * m + j] == 2;
                    }});
    made.push_back({"tags" + kind, pair(plain(AtomKind::ids, 0, 0, 1)), [=](int64_t b, int64_t, int64_t i, int64_t j) {
                      return q[b * n + i] == k[b * m + j] || q[b * n + i] == 0;
                    }});
  }
  const int64_t slots = 3, query_block = 1 + r.below(n), key_block = 1 + r.below(m);
  const int64_t entries = (n + query_block - 1) / query_block;
  const int32_t* listed = arrays.keep(ids(r, batch * heads * entries * slots, (m + key_block - 1) / key_block, true));
  const int32_t* counts = arrays.keep(ids(r, batch * heads * entries, slots + 1, true));
  made.push_back({"blocks",
                  {AtomKind::blocks, {query_block, key_block, slots, entries}, listed, heads * entries * slots,
                   entries * slots, 0, counts, heads * entries, entries},
                  [=](int64_t b, int64_t h, int64_t i, int64_t j) {
                    const int64_t e = (b * heads + h) * entries + i / query_block;
                    for (int32_t s = 0; s < counts[e]; ++s)
                      if (listed[e * slots + s] == j / key_block) return true;
                    return false;
                  }, true});
  std::vector<uint8_t> allow(batch * heads * n * m);
  for (uint8_t& x : allow) x = r.below(4) > 0;
  arrays.bytes.push_back(std::move(allow));
  const uint8_t* dense = arrays.bytes.back().data();
  made.push_back({"dense",
                  {AtomKind::dense, {0, 0, 0, 0}, dense, heads * n * m, n * m, m, nullptr, 0, 0},
                  [=](int64_t b, int64_t h, int64_t i, int64_t j) {
                    return dense[((b * heads + h) * n + i) * m + j] != 0;
                  }});
  return made;
}

}  // namespace vlm::test
