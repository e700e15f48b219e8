// Merge of attention results over disjoint sets of keys, forward and backward. Compiled once per level.
#include "attention/attention_tiles.hpp"
#include "attention/statistics_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t GRAIN_ROWS = 256;

struct Row {
  int64_t b, h, i, lse;  // `lse`: place in [batch, heads, length]
};

// Rows in the order in which the first part lies in memory, heads inside positions or the other way round.
template <class Call>
VLM_INLINE Row row_of(const Call& c, int64_t at) {
  const int64_t b = at / (c.heads * c.length), rest = at % (c.heads * c.length);
  const bool heads_inside = c.outs[0].head_stride < c.outs[0].row_stride;
  const int64_t h = heads_inside ? rest % c.heads : rest / c.length;
  const int64_t i = heads_inside ? rest / c.heads : rest % c.length;
  return {b, h, i, (b * c.heads + h) * c.length + i};
}
VLM_INLINE const float* row_at(const Heads& t, const Row& r) { return head_of(t, r.b, r.h) + r.i * t.row_stride; }
VLM_INLINE float* row_at(const MutableHeads& t, const Row& r) { return head_of(t, r.b, r.h) + r.i * t.row_stride; }

// The greatest lse of a row (NaN if there is one), and the sum of exp(lse - top): merged they lose the sum where lse is large.
struct Together {
  float top, sum;
};
template <class Call>
VLM_INLINE Together together(const Call& c, int64_t at) {
  Together of{-infinity, 0.0f};
  for (int64_t p = 0; p < c.parts; ++p) {
    const float lse = c.lses[p][at];
    of.top = lse > of.top || lse != lse ? lse : of.top;  // NaN stays
  }
  for (int64_t p = 0; p < c.parts && of.top != -infinity; ++p) of.sum += __builtin_expf(c.lses[p][at] - of.top);
  return of;
}

void merge_row(const AttentionMerge& c, const Row& row) {
  const int64_t at = row.lse;
  float* out = row_at(c.out, row);
  const auto [top, sum] = together(c, at);
  const bool empty = top == -infinity;
  c.lse[at] = empty ? -infinity : top + __builtin_logf(sum);
  bool first = true;
  for (int64_t p = 0; p < c.parts && !empty; ++p) {
    const float weight = __builtin_expf(c.lses[p][at] - top) / sum;
    if (weight == 0.0f) continue;
    const float* from = row_at(c.outs[p], row);
    for (int64_t e = 0; e < c.width; e += W) {
      const vf term = load_first(from + e, c.width - e) * weight;
      store_first(out + e, first ? term : load_first(out + e, c.width - e) + term, c.width - e);
    }
    first = false;
  }
  for (int64_t e = 0; e < c.width && first; e += W) store_first(out + e, vf{}, c.width - e);
}

void split_row(const AttentionMergeBackward& c, const Row& row) {
  const int64_t at = row.lse;
  const float *out = row_at(c.out, row), *dout = row_at(c.dout, row);
  const auto [top, sum] = together(c, at);
  for (int64_t p = 0; p < c.parts; ++p) {
    const float weight = top == -infinity ? 0.0f : __builtin_expf(c.lses[p][at] - top) / sum;
    float* to = row_at(c.douts[p], row);
    if (weight == 0.0f) {
      for (int64_t e = 0; e < c.width; e += W) store_first(to + e, vf{}, c.width - e);
      c.dlses[p][at] = 0.0f;
      continue;
    }
    const float* from = row_at(c.outs[p], row);
    vf dot{};
    for (int64_t e = 0; e < c.width; e += W) {
      const int64_t n = c.width - e;
      const vf gradient = load_first(dout + e, n);
      dot += gradient * (load_first(from + e, n) - load_first(out + e, n));
      store_first(to + e, gradient * weight, n);
    }
    c.dlses[p][at] = weight * (c.dlse[at] + sum_lanes(dot));
  }
}

template <class Call>
int useful(const Call& c, int threads) {
  return c.batch * c.heads * c.length * (c.width + 1) * c.parts < 200000 ? 1 : threads;
}

}  // namespace

void attention_merge(const AttentionMerge& call, int threads) {
  parallel_for(call.batch * call.heads * call.length, GRAIN_ROWS, useful(call, threads),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t at = begin; at < end; ++at) merge_row(call, row_of(call, at));
               });
}

void attention_merge_backward(const AttentionMergeBackward& call, int threads) {
  parallel_for(call.batch * call.heads * call.length, GRAIN_ROWS, useful(call, threads),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t at = begin; at < end; ++at) split_row(call, row_of(call, at));
               });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
