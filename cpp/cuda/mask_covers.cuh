// Covers of the tiles of a mask, once for a call: a warp asks the pairs of a tile that no closed form decides.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/mask_program.hpp"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

__global__ void __launch_bounds__(TILE_THREADS, 1)
    mask_cover_kernel(const __grid_constant__ MaskProgram mask, uint8_t* covers, int64_t count) {
  const int64_t tile = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (tile >= count) return;  // a whole warp
  const int64_t across = pieces(mask.keys, COVER_TILE), down = pieces(mask.queries, COVER_TILE);
  const int64_t j0 = tile % across * COVER_TILE, i0 = tile / across % down * COVER_TILE, member = tile / across / down;
  const int64_t heads = mask.cover_head == 0 ? 1 : mask.heads, b = member / heads, h = member % heads;
  const int64_t i1 = smaller(i0 + COVER_TILE, mask.queries), j1 = smaller(j0 + COVER_TILE, mask.keys);
  Cover cover = mask.closed_cover(b, i0, i1, j0, j1);
  if (cover == Cover::partial) {
    const int64_t j = j0 + threadIdx.x % 32;
    bool any = false, all = true;
    for (int64_t i = i0; i < i1 && j < j1; ++i) {
      const bool is = mask.allows(b, h, i, j);
      any = any || is;
      all = all && is;
    }
    const bool nothing = __ballot_sync(all_lanes, any) == 0, everything = __ballot_sync(all_lanes, all) == all_lanes;
    cover = everything ? Cover::full : nothing ? Cover::skip : Cover::partial;
  }
  if (threadIdx.x % 32 == 0) covers[tile] = static_cast<uint8_t>(cover);
}

// The program of a problem; throws std::invalid_argument on atoms that do not fit. `covers` is not set.
inline MaskProgram mask_program(const AttentionProblem& p) {
  MaskProgram m{};
  m.batch = p.batch, m.heads = p.query_heads, m.queries = p.queries, m.keys = p.keys;
  m.causal = p.causal, m.causal_offset = p.causal_offset;
  m.key_mask = p.key_mask, m.key_mask_stride = p.key_mask_stride;
  m.global = -1;
  require(p.atom_count >= 0 && p.atom_count <= MAX_ATOMS, "attention: CUDA kernels take at most 8 mask atoms");
  require(p.atom_count == 0 || (p.queries < INT32_MAX && p.keys < INT32_MAX),
          "attention: over 2^31 tokens under a mask");
  const int64_t tiles = pieces(p.queries, COVER_TILE) * pieces(p.keys, COVER_TILE);
  bool by_batch = false, by_head = false;
  for (int64_t t = 0; t < p.atom_count; ++t) {
    const MaskAtom& atom = p.atoms[t];
    require(atom.kind >= AtomKind::band && atom.kind <= AtomKind::blocks, "mask: unknown kind of atom");
    if (atom.kind == AtomKind::global) {
      require(m.global < 0, "mask: more than one global atom");
      m.global = int(t);
    }
    if (atom.kind == AtomKind::block_causal) require(atom.n[1] > 0, "mask: block size must be positive");
    if (atom.kind == AtomKind::blocks)
      require(atom.n[0] > 0 && atom.n[1] > 0 && atom.n[2] >= 0 && atom.n[3] >= pieces(p.queries, atom.n[0]),
              "mask: block lists do not fit the queries");
    by_batch = by_batch || atom.a_batch != 0 || atom.b_batch != 0;
    by_head = by_head || atom.a_head != 0 || atom.b_head != 0;
    m.atoms[t] = atom;
  }
  m.count = int(p.atom_count);
  m.cover_head = by_head ? tiles : 0;
  m.cover_batch = by_batch ? tiles * (by_head ? p.query_heads : 1) : 0;
  return m;
}

inline int64_t cover_count(const MaskProgram& m) {
  if (m.count == 0) return 0;
  return pieces(m.queries, COVER_TILE) * pieces(m.keys, COVER_TILE) * (m.cover_head == 0 ? 1 : m.heads) *
         (m.cover_batch == 0 ? smaller(m.batch, int64_t(1)) : m.batch);
}

// The program with its covers, which take cover_count bytes of `room`.
inline MaskProgram prepared_mask(const AttentionProblem& p, void* room, void* stream) {
  MaskProgram m = mask_program(p);
  const int64_t count = cover_count(m);
  if (count == 0) return m;
  uint8_t* covers = static_cast<uint8_t*>(room);
  VLM_LAUNCH(mask_cover_kernel, {blocks(pieces(count, TILE_THREADS / 32))}, {TILE_THREADS}, 0, stream, m, covers,
             count);
  m.covers = covers;
  return m;
}

}  // namespace vlm::cuda
