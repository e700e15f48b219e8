// Mask programs on CUDA: covers of tiles against counted pairs, attention under every atom against the oracle, tables
// of relative positions.
#include <stdexcept>

#include "../mask_cases.hpp"
#include "cuda/mask_program.hpp"
#include "emulated_attention.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

// A width of 4: masks are the point.
AttentionTensors tensors(int64_t n, int64_t m, const std::vector<MaskAtom>& atoms, bool key_mask) {
  AttentionTensors t(AttentionCase{batch, heads, 1, n, m, 4, 4, false, 0, key_mask ? 1 : 0, 0});
  t.atoms = atoms;
  return t;
}

// The covers that the entry left in its workspace say skip and full exactly where it is so.
void covers_are_exact(const std::string& name, AttentionTensors& t, const Predicate& allow) {
  const int64_t n = t.c.queries, m = t.c.keys, down = cuda::pieces(n, 32), across = cuda::pieces(m, 32);
  std::vector<uint8_t> covers(cuda::attention_forward_workspace(t.problem()), 77);
  cuda::attention_forward(t.forward(), covers.data(), nullptr);
  const int64_t members = int64_t(covers.size()) / (down * across);
  check(members == 1 || members == batch || members == batch * heads, name + ": members");
  bool right = true;
  for (int64_t tile = 0; tile < int64_t(covers.size()); ++tile) {
    const int64_t member = tile / (down * across), i0 = tile / across % down * 32, j0 = tile % across * 32;
    const int64_t b = members == batch * heads ? member / heads : member, h = members > batch ? member % heads : 0;
    int64_t allowed = 0, all = 0;
    for (int64_t i = i0; i < std::min(i0 + 32, n); ++i)
      for (int64_t j = j0; j < std::min(j0 + 32, m); ++j) {
        allowed += allow(b, h, i, j);
        ++all;
      }
    const Cover truth = allowed == 0 ? Cover::skip : allowed == all ? Cover::full : Cover::partial;
    right = right && covers[tile] == uint8_t(truth);
  }
  check(right, name + ": covers");
}

void judge(const std::string& name, const std::vector<MaskAtom>& atoms, const Predicate& allow, int64_t n, int64_t m) {
  AttentionTensors t = tensors(n, m, atoms, n % 2 == 1);
  covers_are_exact(name, t, allow);
  const AttentionAnswer o = attention_oracle(t.backward());
  run_attention(t);
  check_close_to(t, o, name);
}

void every_atom_alone_and_in_pairs(int64_t n, int64_t m) {
  Numbers r(11);
  Arrays arrays;
  const std::vector<Made> made = atoms(r, arrays, n, m);
  int at = 0;
  for (const Made& one : made) {
    emulation::mode = {at % 4 > 1, at % 2 == 1, {}};  // all orders of execution, in turn
    ++at;
    const std::string name = one.name + " N" + std::to_string(n) + " " + emulation::mode.name();
    judge(name, {one.atom}, one.allow, n, m);
    const Made& other = made[r.below(made.size())];
    judge(name + " and " + other.name, {one.atom, other.atom},
          [&](int64_t b, int64_t h, int64_t i, int64_t j) {
            return one.allow(b, h, i, j) && other.allow(b, h, i, j);
          },
          n, m);
    if (!one.local) continue;
    std::vector<int32_t> rare(n + batch * m);
    for (int32_t& x : rare) x = r.below(30) == 0;
    const int32_t *q = arrays.keep(rare), *k = q + n;
    const MaskAtom global{AtomKind::global, {0, 0, 0, 0}, q, 0, 0, 0, k, m, 0};
    judge(name + " and " + other.name + " opened", {one.atom, global, other.atom},
          [&](int64_t b, int64_t h, int64_t i, int64_t j) {
            const bool open = q[i] != 0 || k[b * m + j] != 0;
            return (one.allow(b, h, i, j) || open) && (other.allow(b, h, i, j) || (other.local && open));
          },
          n, m);
  }
  emulation::mode = {};
}

// Keys that no query sees lie in skipped tiles: NaN there stays there.
void skipped_tiles_are_not_read() {
  AttentionTensors t = tensors(40, 200, {plain(AtomKind::local_band, 160, 20, 0)}, false);
  const int64_t unseen = 64 * t.c.key_heads * (t.c.width + AttentionTensors::gap);  // of the first sequence
  const AttentionAnswer o = attention_oracle(t.backward());
  std::fill_n(t.k.begin(), unseen, NAN);
  std::fill_n(t.v.begin(), unseen, NAN);
  run_attention(t);
  check_close_to(t, o, "NaN in skipped tiles");
}

// ALiBi with documents: a table for each head, or one for all.
void relative_positions() {
  for (int64_t n : {1, 33, 70, 140}) {
    const int64_t m = n + 20;
    Numbers r(3);
    Arrays arrays;
    const int32_t *q = arrays.keep(ids_of_batch(r, n, 3, false)), *k = arrays.keep(ids_of_batch(r, m, 3, false));
    AttentionTensors t = tensors(n, m, {{AtomKind::ids, {0, 0, 0, 0}, q, n, 0, 0, k, m, 0}}, true);
    std::vector<float> table;
    for (int64_t h = 0; h < (n == 33 ? 1 : heads); ++h)
      for (int64_t at = 0; at < n + m - 1; ++at)  // key - query = at - (n - 1)
        table.push_back(-std::fabs(float(at - (n - 1) - (m - n))) * (h == 0 ? 0.25f : 0.0625f));
    t.give_table(table);
    const AttentionAnswer o = attention_oracle(t.backward());
    in_every_mode([&](const std::string& mode) {
      run_attention(t);
      check_close_to(t, o, "ALiBi N" + std::to_string(n) + " " + mode);
    });
  }
}

void what_does_not_fit_is_refused() {
  const auto refused = [](const std::string& what, auto change) {
    AttentionTensors t = tensors(4, 4, {}, false);
    AttentionForward call = t.forward();
    change(call.problem);
    try {
      cuda::attention_forward(call, nullptr, nullptr);
      check(false, what + " was taken");
    } catch (const std::invalid_argument&) {
    }
  };
  MaskAtom list[9];
  for (MaskAtom& atom : list) atom = plain(AtomKind::band, 0, 1, 1);
  const auto with = [&](const MaskAtom& first, int64_t count) {
    return [&list, first, count](AttentionProblem& p) {
      list[0] = first;
      p.atoms = list, p.atom_count = count;
    };
  };
  refused("nine atoms", with(list[0], 9));
  refused("an unknown kind", with(plain(static_cast<AtomKind>(99), 0, 0, 0), 1));
  refused("a block size of 0", with(plain(AtomKind::block_causal, 0, 0, 0), 1));
  refused("too few block lists", with({AtomKind::blocks, {2, 1, 1, 1}, list, 0, 0, 0, list, 0, 0}, 1));
  list[1] = plain(AtomKind::global, 0, 0, 0);
  refused("two global atoms", with(list[1], 2));
  refused("softcap", [](AttentionProblem& p) { p.softcap = 3.0f; });
  refused("dropout", [](AttentionProblem& p) { p.drop_below = 3; });
}

}  // namespace

int main() {
  return run_emulated([] {
    for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {37, 41}, {96, 128}, {70, 140}})
      every_atom_alone_and_in_pairs(n, m);
    skipped_tiles_are_not_read();
    relative_positions();
    what_does_not_fit_is_refused();
    // Two tiles each way, partial ones next to full ones: the bits need their barriers.
    AttentionTensors small(AttentionCase{1, 2, 1, 130, 130, 8, 8, false, 0, 0, 8 + 2});
    small.atoms = {plain(AtomKind::local_band, 0, 70, 5)};
    const AttentionOracle exact = oracle(small);
    AttentionTensors wide = small;
    wide.c.bias = 0;
    wide.bias.clear();
    wide.give_table(Numbers(2).normal(heads * (2 * 130 - 1)));
    const AttentionOracle with_table = oracle(wide);
    every_barrier_is_needed("attention with a table", [&] {
      AttentionTensors t = wide;
      run_attention(t);
      return close(t, with_table);
    });
    every_barrier_is_needed("masked attention", [&] {
      AttentionTensors t = small;
      run_attention(t);
      return close(t, exact);
    });
  });
}
