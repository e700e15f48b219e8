// Tile programs against predicates: no "full" tile holds a removed pair, no "skipped" one an allowed pair, nothing lies
// outside the named columns, and a row of a tile loses exactly its removed pairs.
#include <stdexcept>

#include "core/tile_program.hpp"
#include "mask_cases.hpp"

using namespace vlm;
using namespace vlm::test;
using namespace vlm::VLM_LEVEL;

namespace {

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
