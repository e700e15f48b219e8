// Shared by the attention kernels: the program of a head (masks, cap, biases, dropout) and its use on a row of scores.
// Per-level code.
#pragma once

#include <cfloat>

#include "core/kernel_table.hpp"
#include "core/parallel_for.hpp"
#include "core/random.hpp"
#include "core/storage.hpp"
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

// Queries, keys, values, outputs and their gradients: numbers of the storage type.
VLM_INLINE const Element* stored(const Heads& h, int64_t b, int64_t head) {
  return reinterpret_cast<const Element*>(h.data) + b * h.batch_stride + head * h.head_stride;
}
VLM_INLINE Element* stored(const MutableHeads& h, int64_t b, int64_t head) {
  return reinterpret_cast<Element*>(h.data) + b * h.batch_stride + head * h.head_stride;
}

VLM_INLINE int64_t relative_length(const AttentionProblem& p) {
  if (p.grid_columns > 0) return (2 * p.grid_rows - 1) * (2 * p.grid_columns - 1);
  return larger(0, p.queries + p.keys - 1);
}

// What happens to the scores of one (batch, head), beside the bias that is given pair by pair.
struct AttentionProgram : MaskProgram {
  float softcap;
  const float* relative;  // of this head
  int64_t queries, grid_rows, grid_columns;
  uint32_t drop_below, drop_key;
  float drop_scale;

  // Walk the numbers of `relative` that row i meets at keys [j0, j0 + n): piece(column, where in relative, length).
  template <class Piece>
  VLM_INLINE_MEMBER void walk_relative(int64_t i, int64_t j0, int64_t n, Piece piece) const {
    if (grid_columns == 0) {
      piece(0, queries - 1 - i + j0, n);
      return;
    }
    const int64_t yi = i / grid_columns, xi = i % grid_columns;
    for (int64_t c = 0; c < n;) {
      const int64_t y = (j0 + c) / grid_columns, x = (j0 + c) % grid_columns, count = smaller(grid_columns - x, n - c);
      piece(c, (y - yi + grid_rows - 1) * (2 * grid_columns - 1) + x - xi + grid_columns - 1, count);
      c += count;
    }
  }
};

// The masks of every sequence: keys as vector lanes, how much of each key tile exists, and the atoms.
struct KeyMasks {
  int64_t keys, padded, tiles;
  const uint8_t* mask;
  int64_t mask_stride;
  MaskTables atoms;
  Scratch lanes, covers;

  KeyMasks(const AttentionProblem& p)
      : keys(p.keys),
        padded(round_up(p.keys, W)),
        tiles((p.keys + BC - 1) / BC),
        mask(p.key_mask),
        mask_stride(p.key_mask_stride),
        atoms(MaskSpec{p.batch, p.query_heads, p.queries, p.keys, p.atoms, p.atom_count, p.causal, p.causal_offset}),
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

  AttentionProgram program(const AttentionProblem& p, int64_t b, int64_t h) const {
    AttentionProgram to;
    atoms.fill(to, b, h);
    to.keys = mask == nullptr ? KeyAtom{nullptr, nullptr} : KeyAtom{lanes_of(b), covers_of(b)};
    to.softcap = p.softcap;
    to.relative = p.relative == nullptr ? nullptr : p.relative + h * p.relative_head_stride;
    to.queries = p.queries;
    to.grid_rows = p.grid_rows;
    to.grid_columns = p.grid_columns;
    to.drop_below = p.drop_below;
    to.drop_key = p.drop_below == 0 ? 0 : head_key(p.seed, b, h);
    to.drop_scale = 1.0f / p.keep_share;
    return to;
  }
};

// 1 / |row| of queries and keys for the cosine score: [batch, query_heads, queries], [batch, key_heads, keys].
struct InverseLengths {
  const AttentionProblem& p;
  Scratch queries, keys;

  InverseLengths(const AttentionProblem& problem, int threads)
      : p(problem),
        queries(problem.temperature == nullptr ? 0 : problem.batch * problem.query_heads * problem.queries),
        keys(problem.temperature == nullptr ? 0 : problem.batch * problem.key_heads * problem.keys) {
    if (p.temperature == nullptr) return;
    measure(p.q, p.query_heads, p.queries, queries.data, threads);
    measure(p.k, p.key_heads, p.keys, keys.data, threads);
  }
  void measure(const Heads& of, int64_t heads, int64_t length, float* to, int threads) const {
    parallel_for(p.batch * heads, 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t at = begin; at < end; ++at)
        for (int64_t i = 0; i < length; ++i) {
          const Element* row = stored(of, at / heads, at % heads) + i * of.row_stride;
          vf sum{};
          for (int64_t e = 0; e < p.width; e += W) {
            const vf x = load_first(row + e, p.width - e);
            sum += x * x;
          }
          const float norm = __builtin_sqrtf(sum_lanes(sum));
          to[at * length + i] = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
        }
    });
  }
  // Null for plain products.
  const float* of_queries(int64_t b, int64_t h, int64_t i0) const {
    return p.temperature == nullptr ? nullptr : queries.data + (b * p.query_heads + h) * p.queries + i0;
  }
  const float* of_keys(int64_t b, int64_t key_head, int64_t j0) const {
    return p.temperature == nullptr ? nullptr : keys.data + (b * p.key_heads + key_head) * p.keys + j0;
  }
};

// What the product of a head is multiplied by.
VLM_INLINE float scale_of(const AttentionProblem& p, int64_t h) {
  return p.temperature == nullptr ? p.scale : p.scale * p.temperature[h * p.temperature_stride];
}

// x -> cap tanh(x / cap) in units of log 2; `slope`, if given, gets the derivative 1 - tanh^2.
static void cap_scores(float* scores, int64_t n, float cap, float* slope) {
  const float inward = ln_2 / cap, outward = cap * log2_e;
  for (int64_t c = 0; c < n; c += W) {
    const vf t = tanh(load(scores + c) * inward);
    store(scores + c, t * outward);
    if (slope != nullptr) store(slope + c, 1.0f - t * t);
  }
}

// A bias in units of log 2. A finite one stays finite, for only -inf removes a pair: below -2.36e38 it would not.
VLM_INLINE vf in_log_2(vf bias) {
  const vf lowest = splat(-FLT_MAX), scaled = bias * log2_e;
  return select((bias >= lowest) & (scaled < lowest), lowest, scaled);
}
VLM_INLINE float in_log_2(float bias) {
  const float scaled = bias * log2_e;
  return bias >= -FLT_MAX && scaled < -FLT_MAX ? -FLT_MAX : scaled;
}

// Rows of a greater lse are given as two numbers, top and log of the sum: the second is lost in the last bits of one.
constexpr float largest_whole_lse = 1024.0f;

VLM_INLINE bool needs_split(const AttentionProblem& p, const float* lse) {
  for (int64_t i = 0; i < p.batch * p.query_heads * p.queries; ++i) {
    const float size = __builtin_fabsf(lse[i]);
    if (size > largest_whole_lse && size != infinity) return true;
  }
  return false;
}

// Finish one row of a score tile in units of log 2: cap it, add the biases, remove pairs, set what lies beyond `n` to
// -inf. `slope` gets the derivative of the cap, if there is one.
VLM_INLINE void finish_scores(float* scores, int64_t n, const float* bias, const AttentionProgram& program, Cover cover,
                              int64_t i, int64_t j0, float* slope = nullptr) {
  if (program.softcap != 0.0f) cap_scores(scores, n, program.softcap, slope);
  if (bias != nullptr)
    for (int64_t c = 0; c < n; c += W) store(scores + c, load(scores + c) + in_log_2(load_first(bias + c, n - c)));
  if (program.relative != nullptr)
    program.walk_relative(i, j0, n, [&](int64_t column, int64_t at, int64_t count) {
      const float* from = program.relative + at;
      for (int64_t c = 0; c < count; ++c) scores[column + c] += in_log_2(from[c]);
    });
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
