// Late interaction, forward and backward. Compiled once per level.
#include "contrastive/late_kernels.hpp"
#include "contrastive/late_tiles.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t FOUND_BYTES = int64_t(4) << 20;  // of maximisers that the backward holds at once
constexpr int64_t GROUP = 8;                       // column samples whose tokens stay in the cache together

VLM_INLINE int64_t kept(const TokenList& list, int64_t sample) { return list.first[sample + 1] - list.first[sample]; }

bool is_broken_token(const TokenList& list, int64_t t, int64_t E) {
  vf sum{};
  for (int64_t e = 0; e < E; e += W) sum += load_first(list.data + list.source[t] + e, E - e) * 0.0f;
  return !(sum_lanes(sum) == 0.0f);
}

// The first kept token of the sample that is not finite, counted from its first kept one; -1 if there is none.
int64_t first_broken(const TokenList& list, int64_t sample, int64_t E) {
  for (int64_t t = list.first[sample]; t < list.first[sample + 1]; ++t)
    if (is_broken_token(list, t, E)) return t - list.first[sample];
  return -1;
}

// Where the maxima of broken samples lie: NaN is the greatest, the first of equals wins. The sweep passes NaN over.
struct BrokenTokens {
  Scratch row_memory, column_memory;  // first_broken of every sample
  int32_t *row, *column;
  bool any = false;

  BrokenTokens(const TokenList& rows, const TokenList& columns, int64_t E)
      : row_memory(rows.samples), column_memory(columns.samples) {
    row = find(rows, E, row_memory);
    column = find(columns, E, column_memory);
  }
  int32_t* find(const TokenList& list, int64_t E, const Scratch& memory) {
    int32_t* to = reinterpret_cast<int32_t*>(memory.data);
    for (int64_t sample = 0; sample < list.samples; ++sample) {
      to[sample] = static_cast<int32_t>(first_broken(list, sample, E));
      any = any || to[sample] >= 0;
    }
    return to;
  }
};

// to += factor * from
VLM_INLINE void add_scaled(float* to, const float* from, float factor, int64_t E) {
  int64_t e = 0;
  for (; e + W <= E; e += W) store(to + e, load(to + e) + load(from + e) * factor);
  for (; e < E; ++e) to[e] += factor * from[e];
}

// to += sum over k of factor[k] * from[k], sums in registers
template <int V>
VLM_INLINE void add_many(float* to, const float* const* from, const float* factor, int64_t count) {
  vf sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = load(to + v * W);
  for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] += load(from[k] + v * W) * factor[k];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(to + v * W, sum[v]);
}

void add_rows(float* to, const float** from, const float* factor, int64_t count, int64_t E) {
  int64_t e = 0;
  for (; e + 8 * W <= E; e += 8 * W, to += 8 * W) {
    add_many<8>(to, from, factor, count);
    for (int64_t k = 0; k < count; ++k) from[k] += 8 * W;
  }
  for (; e + W <= E; e += W, to += W) {
    add_many<1>(to, from, factor, count);
    for (int64_t k = 0; k < count; ++k) from[k] += W;
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t t = 0; t < E - e; ++t) to[t] += factor[k] * from[k][t];
}

// What a token of one side gives to those of the other that it is not the maximiser of is 0 times itself, which is not 0 where
// it is not finite: so it is in torch, and so a broken batch shows.
void spread_broken(const TokenList& from, const int32_t* first, const TokenList& to, int64_t E, float* gradient) {
  if (gradient == nullptr) return;
  Scratch memory(E);
  for (int64_t e = 0; e < E; ++e) memory.data[e] = 0.0f;
  for (int64_t sample = 0; sample < from.samples; ++sample)
    for (int64_t t = from.first[sample]; first[sample] >= 0 && t < from.first[sample + 1]; ++t)
      for (int64_t e = 0; e < E; ++e) memory.data[e] += from.data[from.source[t] + e] * 0.0f;
  for (int64_t t = 0; t < to.count; ++t)
    for (int64_t e = 0; e < E; ++e) gradient[to.position[t] * E + e] += memory.data[e];
}

struct Gradients {
  const LateBackward& call;
  const TokenList &rows, &columns;
  const uint16_t *row_best, *column_best;
  int64_t from;  // first row sample of the block
  int64_t E;
  const BrokenTokens& broken;

  // The place in column sample j that matches token r of row sample i best, and the other way round.
  int64_t row_place(int64_t i, int64_t r, int64_t j) const {
    if (broken.any && broken.row[i] >= 0 && is_broken_token(rows, r, E)) return 0;
    if (broken.any && broken.column[j] >= 0) return broken.column[j];
    return row_places(r)[j];
  }
  int64_t column_place(int64_t i, int64_t c, int64_t j) const {
    if (broken.any && broken.column[j] >= 0 && is_broken_token(columns, c, E)) return 0;
    if (broken.any && broken.row[i] >= 0) return broken.row[i];
    return column_places(i)[c];
  }

  float row_factor(int64_t i, int64_t j) const {
    const float g = call.row_gradient[i * columns.samples + j];
    return call.problem.mean ? g / static_cast<float>(kept(rows, i)) : g;
  }
  float column_factor(int64_t i, int64_t j) const {
    const float g = call.column_gradient[i * columns.samples + j];
    return call.problem.mean ? g / static_cast<float>(kept(columns, j)) : g;
  }
  const float* row_token(int64_t r) const { return rows.data + rows.source[r]; }
  const float* column_token(int64_t c) const { return columns.data + columns.source[c]; }
  const uint16_t* row_places(int64_t r) const { return row_best + (r - rows.first[from]) * columns.samples; }
  const uint16_t* column_places(int64_t i) const { return column_best + (i - from) * columns.count; }

  // All of drows of sample i.
  void row_sample(int64_t i) const {
    const float* sources[GROUP];
    float factors[GROUP];
    for (int64_t j0 = 0; j0 < columns.samples; j0 += GROUP) {
      const int64_t j1 = smaller(j0 + GROUP, columns.samples);
      if (call.row_gradient != nullptr)
        for (int64_t r = rows.first[i]; r < rows.first[i + 1]; ++r) {
          int64_t count = 0;
          for (int64_t j = j0; j < j1; ++j) {
            if (kept(columns, j) == 0) continue;
            sources[count] = column_token(columns.first[j] + row_place(i, r, j));
            factors[count++] = row_factor(i, j);
          }
          add_rows(call.drows + rows.position[r] * E, sources, factors, count, E);
        }
      if (call.column_gradient != nullptr && kept(rows, i) > 0)
        for (int64_t j = j0; j < j1; ++j) {
          const float factor = column_factor(i, j);
          for (int64_t c = columns.first[j]; c < columns.first[j + 1]; ++c) {
            const int64_t r = rows.first[i] + column_place(i, c, j);
            add_scaled(call.drows + rows.position[r] * E, column_token(c), factor, E);
          }
        }
    }
  }

  // What the row samples [from, to) give to dcolumns of sample j.
  void column_sample(int64_t j, int64_t to) const {
    const float* sources[GROUP];
    float factors[GROUP];
    for (int64_t i0 = from; i0 < to; i0 += GROUP) {
      const int64_t i1 = smaller(i0 + GROUP, to);
      if (call.column_gradient != nullptr)
        for (int64_t c = columns.first[j]; c < columns.first[j + 1]; ++c) {
          int64_t count = 0;
          for (int64_t i = i0; i < i1; ++i) {
            if (kept(rows, i) == 0) continue;
            sources[count] = row_token(rows.first[i] + column_place(i, c, j));
            factors[count++] = column_factor(i, j);
          }
          add_rows(call.dcolumns + columns.position[c] * E, sources, factors, count, E);
        }
      if (call.row_gradient != nullptr && kept(columns, j) > 0)
        for (int64_t i = i0; i < i1; ++i) {
          const float factor = row_factor(i, j);
          for (int64_t r = rows.first[i]; r < rows.first[i + 1]; ++r) {
            const int64_t c = columns.first[j] + row_place(i, r, j);
            add_scaled(call.dcolumns + columns.position[c] * E, row_token(r), factor, E);
          }
        }
    }
  }
};

void clear(float* to, int64_t samples, int64_t size, int threads) {
  if (to == nullptr) return;
  parallel_for(samples, 1, threads, [&](int64_t sample, int64_t, int) {
    for (int64_t k = 0; k < size; ++k) to[sample * size + k] = 0.0f;
  });
}

}  // namespace

void late_forward(const LateForward& call, const TokenList& rows, const TokenList& columns, int threads) {
  const int64_t R = rows.samples, C = columns.samples, E = call.problem.width;
  const bool mean = call.problem.mean;
  clear(call.row_values, R, C, threads);
  clear(call.column_values, R, C, threads);
  if (R == 0 || C == 0) return;
  if (call.found == nullptr)
    late_sweep<false>(rows, columns, E, 0, R, {call.row_values, call.column_values, nullptr, nullptr}, threads);
  else
    late_sweep<true>(rows, columns, E, 0, R,
                     {call.row_values, call.column_values, call.found, call.found + rows.count * C}, threads);
  const BrokenTokens broken(rows, columns, E);
  parallel_for(R, 1, threads, [&](int64_t i, int64_t, int) {
    const int64_t row_count = kept(rows, i);
    for (int64_t j = 0; j < C; ++j) {
      const int64_t column_count = kept(columns, j);
      if (row_count == 0 || column_count == 0) continue;
      float *row = call.row_values + i * C + j, *column = call.column_values + i * C + j;
      const float shift = broken.row[i] >= 0 || broken.column[j] >= 0 ? __builtin_nanf("") : 0.0f;
      *row = (mean ? *row / static_cast<float>(row_count) : *row) + shift;
      *column = (mean ? *column / static_cast<float>(column_count) : *column) + shift;
    }
  });
}

void late_backward(const LateBackward& call, const TokenList& rows, const TokenList& columns, int threads) {
  const int64_t R = rows.samples, C = columns.samples, E = call.problem.width;
  clear(call.drows, R, call.problem.rows.tokens * E, threads);
  clear(call.dcolumns, C, call.problem.columns.tokens * E, threads);
  if (R == 0 || C == 0) return;
  const int64_t sample_bytes = 2 * (rows.longest * C + columns.count);
  const bool known = call.found != nullptr;
  const int64_t block = known ? R : larger(1, smaller(R, FOUND_BYTES / larger(sample_bytes, 1)));
  Scratch found(known ? 0 : (block * sample_bytes + 3) / 4);
  uint16_t* own = reinterpret_cast<uint16_t*>(found.data);
  const uint16_t* row_best = known ? call.found : own;
  const uint16_t* column_best = row_best + (known ? rows.count : block * rows.longest) * C;
  const BrokenTokens broken(rows, columns, E);
  for (int64_t from = 0; from < R; from += block) {
    const int64_t to = smaller(from + block, R);
    if (!known)
      late_sweep<true>(rows, columns, E, from, to, {nullptr, nullptr, own, own + block * rows.longest * C}, threads);
    const Gradients gradients{call, rows, columns, row_best, column_best, from, E, broken};
    if (call.drows != nullptr)
      parallel_for(to - from, 1, threads, [&](int64_t i, int64_t, int) { gradients.row_sample(from + i); });
    if (call.dcolumns != nullptr)
      parallel_for(C, 1, threads, [&](int64_t j, int64_t, int) { gradients.column_sample(j, to); });
  }
  if (!broken.any) return;
  spread_broken(columns, broken.column, rows, E, call.drows);
  spread_broken(rows, broken.row, columns, E, call.dcolumns);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
