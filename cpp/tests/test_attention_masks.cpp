// Tile programs against predicates: no "full" tile holds a removed pair, no "skipped" one an allowed pair, nothing lies
// outside the named columns, and a row of a tile loses exactly its removed pairs.
#include <algorithm>
#include <deque>
#include <functional>
#include <stdexcept>

#include "check.hpp"
#include "core/tile_program.hpp"

using namespace vlm;
using namespace vlm::test;
using namespace vlm::VLM_LEVEL;

namespace {

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

std::vector<int32_t> ids(Numbers& numbers, int64_t length, int64_t names, bool scattered) {
  std::vector<int32_t> values(length);
  for (int32_t& id : values) id = static_cast<int32_t>(numbers.below(names));
  if (!scattered) std::sort(values.begin(), values.end());
  return values;
}

std::vector<int32_t> ids_of_batch(Numbers& numbers, int64_t length, int64_t names, bool scattered) {
  std::vector<int32_t> all;
  for (int64_t b = 0; b < batch; ++b)
    for (int32_t id : ids(numbers, length, names, scattered)) all.push_back(id);
  return all;
}

MaskAtom plain(AtomKind kind, int64_t a, int64_t b, int64_t c) {
  return {kind, {a, b, c, 0}, nullptr, 0, 0, 0, nullptr, 0, 0};
}

std::vector<Made> atoms(Numbers& r, Arrays& arrays, int64_t n, int64_t m) {
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

void judge(const std::string& name, const std::vector<MaskAtom>& list, const Predicate& allow, int64_t n, int64_t m,
           Numbers& r) {
  const MaskTables tables(MaskSpec{batch, heads, n, m, list.data(), static_cast<int64_t>(list.size()), false, 0});
  float scores[BC + W];
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      MaskProgram program;
      tables.fill(program, b, h);
      program.keys = {nullptr, nullptr};
      for (int round = 0; round < 15; ++round) {
        const int64_t i0 = round % 2 == 0 ? r.below(n) / MR * MR : r.below(n);
        const int64_t i1 = smaller(n, i0 + 1 + r.below(3 * MR)), tile = r.below((m + BC - 1) / BC);
        const int64_t j0 = tile * BC, width = smaller(BC, m - j0);
        const int64_t j1 = round % 3 == 0 ? j0 + 1 + r.below(width) : j0 + width;
        int64_t allowed = 0;
        const Columns seen = program.columns(i0, i1, j0, j1 - j0, tile);
        for (int64_t i = i0; i < i1; ++i) {
          for (int64_t c = 0; c < BC + W; ++c) scores[c] = 1.0f;
          program.remove(scores, i, j0, j1 - j0);
          for (int64_t j = j0; j < j1; ++j) {
            const bool is = allow(b, h, i, j);
            allowed += is;
            check((scores[j - j0] == 1.0f) == is, name + ": a pair of a partial tile");
            check(!is || (j - j0 >= seen.first && j - j0 < seen.last), name + ": columns");
            check(!is || program.causal.seen(i1 - 1, j0, j1 - j0) > j - j0, name + ": reach");
          }
        }
        const Cover cover = program.cover(i0, i1, j0, j1, tile);
        check(cover != Cover::skip || allowed == 0, name + ": a skipped tile holds a pair");
        check(cover != Cover::full || allowed == (i1 - i0) * (j1 - j0), name + ": a full tile lacks a pair");
      }
    }
}

void every_atom_alone_and_in_pairs() {
  Numbers r(11);
  for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {37, 41}, {60, 300}, {90, 530}}) {
    Arrays arrays;
    const std::vector<Made> made = atoms(r, arrays, n, m);
    for (const Made& one : made) {
      judge(one.name, {one.atom}, one.allow, n, m, r);
      const Made& other = made[r.below(made.size())];
      const Predicate two = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
        return one.allow(b, h, i, j) && other.allow(b, h, i, j);
      };
      judge(one.name + " and " + other.name, {one.atom, other.atom}, two, n, m, r);
      if (!one.local) continue;
      const int32_t *q = arrays.keep(ids(r, n, 9, true)), *k = arrays.keep(ids(r, batch * m, 2, true));
      std::vector<int32_t> rare(k, k + batch * m);
      for (int32_t& x : rare) x = x && r.below(20) == 0;
      k = arrays.keep(rare);
      const MaskAtom global{AtomKind::global, {0, 0, 0, 0}, q, 0, 0, 0, k, m, 0};
      const Predicate opened = [&](int64_t b, int64_t h, int64_t i, int64_t j) {
        const bool open = q[i] != 0 || k[b * m + j] != 0;
        return (one.allow(b, h, i, j) || open) && (other.allow(b, h, i, j) || (other.local && open));
      };
      judge(one.name + " and " + other.name + " opened", {one.atom, global, other.atom}, opened, n, m, r);
    }
  }
}

// What a plain window or causal edge needs must be exact on whole groups: nothing is computed in vain.
void bands_are_skipped_exactly() {
  for (int64_t below : {3, 40, 1000}) {
    const int64_t n = 40 * MR, offset = 0;
    const MaskAtom atom = plain(AtomKind::band, offset, below, 0);
    const MaskTables tables(MaskSpec{1, 1, n, n, &atom, 1, false, 0});
    MaskProgram program;
    tables.fill(program, 0, 0);
    program.keys = {nullptr, nullptr};
    for (int64_t i0 = 0; i0 < n; i0 += MR)
      for (int64_t j0 = 0; j0 < n; j0 += BC) {
        const int64_t j1 = smaller(n, j0 + BC);
        int64_t allowed = 0;
        for (int64_t i = i0; i < i0 + MR; ++i)
          for (int64_t j = j0; j < j1; ++j) allowed += j <= i && i - j <= below;
        const Cover truth = allowed == 0 ? Cover::skip : allowed == MR * (j1 - j0) ? Cover::full : Cover::partial;
        check(program.cover(i0, i0 + MR, j0, j1, j0 / BC) == truth, "band cover");
      }
  }
}

// Block lists that are shared where their counts are not, and the other way round.
void lists_and_counts_are_shared_apart() {
  const int64_t n = 20, m = 40, slots = 2, entries = 4;
  Numbers r(5);
  Arrays arrays;
  const int32_t* list = arrays.keep(ids(r, batch * heads * entries * slots, 8, true));
  const int32_t* count = arrays.keep(ids(r, batch * heads * entries, slots + 1, true));
  for (int kind = 0; kind < 16; ++kind) {
    const int64_t a_batch = kind & 1 ? heads * entries * slots : 0, a_head = kind & 2 ? entries * slots : 0;
    const int64_t b_batch = kind & 4 ? heads * entries : 0, b_head = kind & 8 ? entries : 0;
    const MaskAtom atom{AtomKind::blocks, {5, 5, slots, entries}, list, a_batch, a_head, 0, count, b_batch, b_head};
    judge("blocks shared " + std::to_string(kind), {atom},
          [=](int64_t b, int64_t h, int64_t i, int64_t j) {
            const int32_t* at = list + b * a_batch + h * a_head + i / 5 * slots;
            for (int32_t s = 0; s < count[b * b_batch + h * b_head + i / 5]; ++s)
              if (at[s] == j / 5) return true;
            return false;
          }, n, m, r);
  }
}

// Without a batch there are no arrays to read, shared or not. A block as large as can be holds every key.
void the_ends_of_ranges() {
  for (AtomKind kind : {AtomKind::prefix, AtomKind::spans, AtomKind::ids, AtomKind::rows, AtomKind::global,
                        AtomKind::dense, AtomKind::blocks}) {
    const MaskAtom atom{kind, {1, 1, 0, 9}, nullptr, 0, 0, 0, nullptr, 0, 0};
    PreparedMask mask = prepare_mask(MaskSpec{0, 2, 9, 7, &atom, 1, false, 0});
    release_mask(mask);
  }
  Numbers r(5);
  const int32_t index[1] = {0}, count[1] = {1};
  judge("one block", {{AtomKind::blocks, {INT64_MAX, INT64_MAX, 1, 1}, index, 0, 0, 0, count, 0, 0}},
        [](int64_t, int64_t, int64_t, int64_t) { return true; }, 30, 50, r);
  judge("far bounds", {plain(AtomKind::band, INT64_MIN, INT64_MAX, INT64_MAX)},
        [](int64_t, int64_t, int64_t, int64_t) { return true; }, 30, 50, r);
  judge("all blocks", {plain(AtomKind::block_causal, INT64_MAX, INT64_MAX, 0)},
        [](int64_t, int64_t, int64_t, int64_t) { return true; }, 30, 50, r);
  judge("no position", {plain(AtomKind::lambda, INT64_MIN, INT64_MAX, INT64_MAX)},
        [](int64_t, int64_t, int64_t, int64_t) { return false; }, 30, 50, r);
}

void what_does_not_fit_is_refused() {
  const auto refused = [](const MaskAtom& atom, const std::string& what) {
    try {
      PreparedMask mask = prepare_mask(MaskSpec{1, 1, 4, 4, &atom, 1, false, 0});
      release_mask(mask);
      check(false, what + " was taken");
    } catch (const std::invalid_argument&) {
    }
  };
  refused(plain(AtomKind::block_causal, 0, 0, 0), "block size 0");
  refused(plain(static_cast<AtomKind>(99), 0, 0, 0), "an unknown kind");
  const int32_t index[2] = {0, 9}, count[2] = {1, 1};
  refused({AtomKind::blocks, {2, 1, 1, 2}, index, 0, 0, 0, count, 0, 0}, "a block that does not exist");
  refused({AtomKind::blocks, {2, 1, 1, 1}, index, 0, 0, 0, count, 0, 0}, "too few block lists");
  refused({AtomKind::blocks, {2, 1, -1, 2}, index, 0, 0, 0, count, 0, 0}, "negative slots");
  for (AtomKind kind : {AtomKind::prefix, AtomKind::spans, AtomKind::ids, AtomKind::rows, AtomKind::global,
                        AtomKind::dense})
    refused(plain(kind, 0, 0, 0), "an atom without its arrays");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    every_atom_alone_and_in_pairs();
    bands_are_skipped_exactly();
    lists_and_counts_are_shared_apart();
    the_ends_of_ranges();
    what_does_not_fit_is_refused();
  });
}
