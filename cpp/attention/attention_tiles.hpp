// Shared by the forward and backward attention kernels: key masks as lanes, bias and masks on a row. Per-level code.
#pragma once

#include "core/kernel_table.hpp"
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "core/tile_program.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {

VLM_INLINE const float* head_of(const Heads& h, int64_t b, int64_t head) {
  return h.data + b * h.batch_stride + head * h.head_stride;
}
VLM_INLINE float* head_of(const MutableHeads& h, int64_t b, int64_t head) {
  return h.data + b * h.batch_stride + head * h.head_stride;
}

// The key mask of every sequence as vector lanes, and how much of each key tile exists.
struct KeyMasks {
  int64_t keys, padded, tiles;
  const uint8_t* mask;
  int64_t mask_stride;
  Scratch lanes, covers;

  KeyMasks(const AttentionProblem& p)
      : keys(p.keys),
        padded(round_up(p.keys, W)),
        tiles((p.keys + BC - 1) / BC),
        mask(p.key_mask),
        mask_stride(p.key_mask_stride),
        lanes(mask == nullptr ? 0 : p.batch * padded),
        covers(mask == nullptr ? 0 : (p.batch * tiles + 3) / 4) {
    if (mask == nullptr) return;
    for (int64_t b = 0; b < p.batch; ++b) {
      int32_t* lane = lanes_of(b);
      int64_t found = 0;
      for (int64_t j = 0; j < padded; ++j) {
        const bool there = j < keys && mask[b * mask_stride + j] != 0;
        lane[j] = there ? -1 : 0;
        found += there;
        if ((j + 1) % BC == 0 || j + 1 == padded) {
          const int64_t tile = j / BC, breadth = smaller(BC, keys - tile * BC);
          const Cover cover = found == 0 ? Cover::skip : found == breadth ? Cover::full : Cover::partial;
          covers_of(b)[tile] = static_cast<uint8_t>(cover);
          found = 0;
        }
      }
    }
  }
  int32_t* lanes_of(int64_t b) const { return reinterpret_cast<int32_t*>(lanes.data) + b * padded; }
  uint8_t* covers_of(int64_t b) const { return reinterpret_cast<uint8_t*>(covers.data) + b * tiles; }
  const uint8_t* kept(int64_t b, int64_t j0) const { return mask == nullptr ? nullptr : mask + b * mask_stride + j0; }

  MaskProgram program(const AttentionProblem& p, int64_t b) const {
    KeyAtom keys_atom{nullptr, nullptr};
    if (mask != nullptr) keys_atom = KeyAtom{lanes_of(b), covers_of(b)};
    return MaskProgram{CausalAtom{p.causal, p.causal_offset}, keys_atom};
  }
};

// Finish one row of a score tile in units of log 2: add the bias, remove pairs, set what lies beyond `n` to -inf.
VLM_INLINE void finish_scores(float* scores, int64_t n, const float* bias, const MaskProgram& program, Cover cover,
                              int64_t i, int64_t j0) {
  if (bias != nullptr)
    for (int64_t c = 0; c < n; c += W) store(scores + c, load(scores + c) + load_first(bias + c, n - c) * log2_e);
  if (cover == Cover::partial) program.remove(scores, i, j0, n);
  for (int64_t c = n; c < round_up(n, W); ++c) scores[c] = -infinity;
}

VLM_INLINE const float* bias_row(const Heads& bias, int64_t b, int64_t h, int64_t i, int64_t j0) {
  return bias.data == nullptr ? nullptr : head_of(bias, b, h) + i * bias.row_stride + j0;
}

// Small problems are not worth waking anybody for.
VLM_INLINE int useful_threads(const AttentionProblem& p, int threads) {
  const double work = static_cast<double>(p.batch) * p.query_heads * p.queries * p.keys * (p.width + p.value_width);
  return work < 2e6 ? 1 : threads;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
