// Which pairs of a tile are positive, kept, and part of a denominator. Per-level code.
#pragma once

#include "contrastive/pair_sweep.hpp"

namespace vlm {
namespace VLM_LEVEL {

VLM_INLINE vi lanes_below(int64_t count) {
  return lane_numbers() < splat_int(static_cast<int32_t>(smaller(count, W)));
}

struct PairMask {
  vi positive, kept, denominator;
};

struct PairMasks {
  const PairTargets& targets;
  bool decoupled;
  float similar, teacher_bias;

  PairMasks(const PairTargets& t, const PairProblem& p)
      : targets(t), decoupled(p.decoupled), similar(p.teacher.similar), teacher_bias(p.teacher.bias) {}

  // Lanes from column c of row r of the tile; `u` gets the teacher's logits, 0 without a teacher.
  VLM_INLINE_MEMBER PairMask at(const LogitTile& t, int64_t r, int64_t c, vf* u) const {
    const int64_t row = t.row + r, column = t.column + c;
    const vi positive = load(targets.column_ids + column) == splat_int(targets.row_ids[row]);
    vi excluded = load(targets.column_excluded + column) == splat_int(targets.row_excluded[row]);
    *u = vf{};
    if (t.teacher != nullptr) {
      *u = load(t.teacher + r * LDS + c) + teacher_bias;
      excluded |= *u > splat(similar);
    }
    const vi kept = lanes_below(t.breadth - c) & (positive | ~excluded);
    return {positive & kept, kept, decoupled ? kept & ~positive : kept};
  }
};

}  // namespace VLM_LEVEL
}  // namespace vlm
