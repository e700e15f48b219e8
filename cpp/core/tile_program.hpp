// Tile programs: what part of a score tile may exist. Per-level code.
//
// A program is an AND of atoms. Each atom says of a tile of queries [i0, i1) and keys [j0, j1) whether all, some or no
// pairs are allowed, how many leading keys a query can see at most, and removes pairs from a row of a partial tile. A
// new kind of mask is a new atom in MaskProgram; the drivers do not change.
#pragma once

#include "core/simd.hpp"

namespace vlm {
namespace VLM_LEVEL {

enum class Cover : uint8_t { skip = 0, partial = 1, full = 2 };

VLM_INLINE Cover both(Cover a, Cover b) { return a < b ? a : b; }

// Query i may see keys j <= i + offset.
struct CausalAtom {
  bool on;
  int64_t offset;

  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (!on || j1 - 1 <= i0 + offset) return Cover::full;
    return j0 > i1 - 1 + offset ? Cover::skip : Cover::partial;
  }
  // Keys of [j0, j0 + n) that query i, or any query before it, can see: they are the first ones.
  VLM_INLINE_MEMBER int64_t seen(int64_t i, int64_t j0, int64_t n) const {
    if (!on) return n;
    const int64_t limit = i + offset - j0 + 1;
    return limit < 0 ? 0 : smaller(limit, n);
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n) const {
    if (!on) return;
    for (int64_t c = seen(i, j0, n); c < n; ++c) scores[c] = -infinity;
  }
};

// Key j exists if lanes[j] is all ones. Covers of whole tiles are prepared once for a sequence.
struct KeyAtom {
  const int32_t* lanes;   // [keys padded to W], 0 or -1; null = every key
  const uint8_t* covers;  // [key tiles]

  VLM_INLINE_MEMBER Cover cover(int64_t tile) const {
    return lanes == nullptr ? Cover::full : static_cast<Cover>(covers[tile]);
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t j0, int64_t n) const {
    if (lanes == nullptr) return;
    for (int64_t c = 0; c < n; c += W)  // scores have room up to a multiple of W
      store(scores + c, select(load(lanes + j0 + c), load(scores + c), splat(-infinity)));
  }
};

struct MaskProgram {
  CausalAtom causal;
  KeyAtom keys;

  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t tile) const {
    return both(causal.cover(i0, i1, j0, j1), keys.cover(tile));
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n) const {
    keys.remove(scores, j0, n);
    causal.remove(scores, i, j0, n);
  }
};

}  // namespace VLM_LEVEL
}  // namespace vlm
