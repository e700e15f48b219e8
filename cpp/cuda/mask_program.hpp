// Tile programs on the GPU: the same AND of atoms as cpp/core/tile_program.hpp, as functions that run on both sides.
//
// An atom says of a tile of queries [i0, i1) and keys [j0, j1) whether all, some or no pairs are allowed, and of one
// pair whether it is. A "full" tile is never asked about its pairs; a "skip" tile is not visited.
#pragma once

#include "cuda/device.hpp"

namespace vlm::cuda {

enum class Cover : int { skip = 0, partial = 1, full = 2 };

VLM_BOTH Cover both(Cover a, Cover b) { return a < b ? a : b; }

// Query i may see keys j <= i + offset.
struct CausalAtom {
  bool on;
  int64_t offset;

  VLM_BOTH Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (!on || j1 - 1 <= i0 + offset) return Cover::full;
    return j0 > i1 - 1 + offset ? Cover::skip : Cover::partial;
  }
  VLM_BOTH bool allows(int64_t i, int64_t j) const { return !on || j <= i + offset; }
};

// Key j exists if valid[j] is not 0. Its cover of a tile is found by counting, in the kernels.
struct KeyAtom {
  const uint8_t* valid;  // of this sequence, null = every key

  VLM_BOTH bool exists(int64_t j) const { return valid == nullptr || valid[j] != 0; }
};

struct MaskProgram {
  CausalAtom causal;
  KeyAtom keys;

  VLM_BOTH Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const { return causal.cover(i0, i1, j0, j1); }
  VLM_BOTH bool allows(int64_t i, int64_t j) const { return causal.allows(i, j); }
};

}  // namespace vlm::cuda
