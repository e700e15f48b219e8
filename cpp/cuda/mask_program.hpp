// Tile programs on the GPU: the atoms of vlm/mask.hpp, whose arrays lie on the device, read as they are.
//
// A tile of queries and keys is skipped, full or partial. Closed forms of the atoms say so where they can; the rest is
// found by asking every pair of a tile of 32 x 32 once, in mask_cover_kernel, so that "skip" and "full" are exact. A
// partial tile keeps its allowed pairs as bits in shared memory.
#pragma once

#include "cuda/device.hpp"
#include "vlm/mask.hpp"

namespace vlm::cuda {

constexpr int MAX_ATOMS = 8, COVER_TILE = 32;

VLM_BOTH Cover both(Cover a, Cover b) { return a < b ? a : b; }

VLM_BOTH bool is_local(AtomKind kind) {
  return kind == AtomKind::local_band || kind == AtomKind::lambda || kind == AtomKind::blocks;
}

VLM_BOTH int32_t int_at(const void* array, int64_t at) { return static_cast<const int32_t*>(array)[at]; }

// Which piece of `size` holds `at`, both not negative; 32 bits, because a division of 64 takes many registers.
// Sequences are shorter than 2^31, so that what is cut here lies beyond their ends.
VLM_BOTH uint32_t piece_of(int64_t at, int64_t size) {
  return uint32_t(smaller(at, int64_t(INT32_MAX))) / uint32_t(smaller(size, int64_t(INT32_MAX)));
}

// Whether one atom allows one pair; `global` allows every pair here.
VLM_BOTH bool atom_allows(const MaskAtom& atom, int64_t b, int64_t h, int64_t i, int64_t j) {
  const int64_t d = i + atom.n[0] - j;
  switch (atom.kind) {
    case AtomKind::band:
    case AtomKind::local_band: return d <= atom.n[1] && -d <= atom.n[2];
    case AtomKind::block_causal: {
      const int64_t position = i + atom.n[0];
      return position >= 0 && piece_of(position, atom.n[1]) >= piece_of(j, atom.n[1]);
    }
    case AtomKind::prefix: return d >= 0 || j < int_at(atom.a, b * atom.a_batch);
    case AtomKind::lambda: return d >= 0 && (d < atom.n[1] || j < atom.n[2]);
    case AtomKind::spans: {
      const int32_t own = int_at(atom.a, b * atom.a_batch + i);
      return d >= 0 || (own >= 0 && own == int_at(atom.b, b * atom.b_batch + j));
    }
    case AtomKind::ids: {
      const int32_t own = int_at(atom.a, b * atom.a_batch + i), other = int_at(atom.b, b * atom.b_batch + j);
      return own == other || (atom.n[0] != 0 && other == atom.n[1]) || (atom.n[2] != 0 && own == atom.n[3]);
    }
    case AtomKind::rows: {
      const int64_t at = b * atom.a_batch + 2 * i;
      return int_at(atom.a, at) <= j && j < int_at(atom.a, at + 1);
    }
    case AtomKind::dense:
      return static_cast<const uint8_t*>(atom.a)[b * atom.a_batch + h * atom.a_head + i * atom.a_row + j] != 0;
    case AtomKind::blocks: {
      const int64_t e = piece_of(i, atom.n[0]), listed = b * atom.a_batch + h * atom.a_head + e * atom.n[2];
      const int64_t block = piece_of(j, atom.n[1]);
      const int32_t count = int_at(atom.b, b * atom.b_batch + h * atom.b_head + e);
      for (int32_t s = 0; s < count; ++s)
        if (int_at(atom.a, listed + s) == block) return true;
      return false;
    }
    case AtomKind::global: return true;
  }
  return false;
}

// What the closed form of an atom says of the queries [i0, i1) and keys [j0, j1); partial: it does not say.
VLM_BOTH Cover atom_cover(const MaskAtom& atom, int64_t b, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t least = i0 + atom.n[0] - (j1 - 1), most = i1 - 1 + atom.n[0] - j0;  // of the distance
  switch (atom.kind) {
    case AtomKind::band:
    case AtomKind::local_band:
      if (-most > atom.n[2] || least > atom.n[1]) return Cover::skip;
      return -least <= atom.n[2] && most <= atom.n[1] ? Cover::full : Cover::partial;
    case AtomKind::block_causal: {
      const int64_t first = i0 + atom.n[0], last = i1 - 1 + atom.n[0], size = atom.n[1];
      if (last < 0 || piece_of(last, size) < piece_of(j0, size)) return Cover::skip;
      return first >= 0 && piece_of(first, size) >= piece_of(j1 - 1, size) ? Cover::full : Cover::partial;
    }
    case AtomKind::prefix: {
      const int32_t length = int_at(atom.a, b * atom.a_batch);
      if (j0 >= length && most < 0) return Cover::skip;
      return j1 <= length || least >= 0 ? Cover::full : Cover::partial;
    }
    case AtomKind::lambda:
      if (most < 0 || (least >= atom.n[1] && j0 >= atom.n[2])) return Cover::skip;
      return least >= 0 && (most < atom.n[1] || j1 <= atom.n[2]) ? Cover::full : Cover::partial;
    case AtomKind::spans: return least >= 0 ? Cover::full : Cover::partial;
    case AtomKind::global: return Cover::full;
    default: return Cover::partial;
  }
}

// The mask of a call, given to kernels by value.
struct MaskProgram {
  int64_t batch, heads, queries, keys;
  bool causal;  // query i may see keys j <= i + causal_offset
  int64_t causal_offset;
  const uint8_t* key_mask;  // null = every key exists
  int64_t key_mask_stride;
  int count, global;  // global: which atom, -1 for none
  MaskAtom atoms[MAX_ATOMS];
  const uint8_t* covers;  // [batch or 1, heads or 1, tiles of queries, tiles of keys], null = no atoms
  int64_t cover_batch, cover_head;

  VLM_BOTH Cover causal_cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (!causal || j1 - 1 <= i0 + causal_offset) return Cover::full;
    return j0 > i1 - 1 + causal_offset ? Cover::skip : Cover::partial;
  }
  VLM_BOTH Cover closed_cover(int64_t b, int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    Cover all = causal_cover(i0, i1, j0, j1);
    for (int t = 0; t < count && all != Cover::skip; ++t) {
      Cover one = atom_cover(atoms[t], b, i0, i1, j0, j1);
      if (one == Cover::skip && global >= 0 && is_local(atoms[t].kind)) one = Cover::partial;
      all = both(all, one);
    }
    return all;
  }
  VLM_BOTH bool allows(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (causal && j > i + causal_offset) return false;
    bool open = false;
    if (global >= 0) {
      const MaskAtom& atom = atoms[global];
      open = int_at(atom.a, b * atom.a_batch + i) != 0 || int_at(atom.b, b * atom.b_batch + j) != 0;
    }
    for (int t = 0; t < count; ++t)
      if (!(open && is_local(atoms[t].kind)) && !atom_allows(atoms[t], b, h, i, j)) return false;
    return true;
  }
};

// The mask of one query head. Key j exists if the key mask has it; the other functions do not look at that.
struct HeadMask {
  const MaskProgram& of;
  int64_t b, h;

  VLM_BOTH bool exists(int64_t j) const {
    return of.key_mask == nullptr || of.key_mask[b * of.key_mask_stride + j] != 0;
  }
  // "Partial" may be said of a part of a tile of 32 x 32 that is really full or empty.
  VLM_BOTH Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (of.covers == nullptr) return of.causal_cover(i0, i1, j0, j1);
    const int64_t across = pieces(of.keys, COVER_TILE);
    const uint8_t* at = of.covers + b * of.cover_batch + h * of.cover_head;
    bool any = false, all = true;
    for (int64_t i = i0 / COVER_TILE; i < pieces(i1, COVER_TILE); ++i)
      for (int64_t j = j0 / COVER_TILE; j < pieces(j1, COVER_TILE); ++j) {
        const Cover one = static_cast<Cover>(at[i * across + j]);
        any = any || one != Cover::skip;
        all = all && one == Cover::full;
      }
    return all ? Cover::full : any ? Cover::partial : Cover::skip;
  }
};

// The allowed pairs of a tile of Q queries and K keys: one bit for each.
template <int Q, int K>
struct PairBits {
  static constexpr int across = K / 32, words = Q * across;
  uint32_t* at;   // [Q, K / 32] in shared memory
  bool full;      // then the bits are not looked at

  // Whole warps; a barrier has to follow where the tile is partial.
  template <int threads>
  VLM_DEVICE void fill(const HeadMask& mask, Cover cover, int64_t i0, int64_t j0) {
    full = cover == Cover::full;
    if (full) return;
#pragma unroll 1
    for (int word = threadIdx.x / 32; word < words; word += threads / 32) {
      const int64_t i = i0 + word / across, j = j0 + word % across * 32 + threadIdx.x % 32;
      const bool is = i < mask.of.queries && j < mask.of.keys && mask.of.allows(mask.b, mask.h, i, j);
      const unsigned bits = __ballot_sync(all_lanes, is);
      if (threadIdx.x % 32 == 0) at[word] = bits;
    }
  }
  VLM_DEVICE bool allows(int query, int key) const {
    return full || (at[query * across + key / 32] >> (key % 32) & 1u) != 0;
  }
};

}  // namespace vlm::cuda
