// Attention over listed key blocks: keys and values are read where they lie, streaming softmax over tiles of keys.
// Compiled once per level. A task is (batch, head, block of queries).
#include "selection/block_tasks.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t TILE_KEYS = 128;  // a tile of 32 queries and the values of its keys fit in the first cache

struct Sizes {
  int64_t lanes, keys, out_stride;  // lanes: queries of a block in whole panels; keys: most of a tile
  bool copied;                      // values are no whole vectors: their rows are copied and padded
  explicit Sizes(const BlockSparseForward& c)
      : lanes(round_up(c.problem.block_q, NR)),
        keys(larger(TILE_KEYS, c.problem.block_k)),
        out_stride(round_up(larger(c.value_width, 1), W)),
        copied(c.value_width % W != 0) {}
};

struct Worker {
  float *query, *scale, *scores, *out, *top, *sum, *fade, *copies;
  int32_t *places, *positions;
  const float **keys, **values;

  static int64_t room(const BlockSparseForward& c, Worker* w, float* at) {
    const Sizes s(c);
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats + 1, NR);
      return place;
    };
    w->query = take(s.lanes * c.problem.width + NR);
    w->scale = take(s.lanes);
    w->scores = take(round_up(s.keys, SCATTERED) * s.lanes);
    w->out = take(s.lanes * s.out_stride);
    w->top = take(s.lanes);
    w->sum = take(s.lanes);
    w->fade = take(s.lanes);
    w->copies = take(s.copied ? s.keys * s.out_stride : 0);
    w->places = reinterpret_cast<int32_t*>(take(s.keys));
    w->positions = reinterpret_cast<int32_t*>(take(s.lanes));
    w->keys = reinterpret_cast<const float**>(take(rows_room(s.keys)));
    w->values = reinterpret_cast<const float**>(take(rows_room(s.keys)));
    for (int64_t lane = 0; at != nullptr && lane < s.lanes; ++lane) w->scale[lane] = c.scale * log2_e;
    return used;
  }
};

// Scores of n keys become weights relative to the running maximum of each query: the streaming softmax. The keys from
// `late` on may lie behind some query. Returns whether what was summed before must be scaled by w.fade.
bool stream(Worker& w, const Sizes& s, int64_t n, int64_t late, int64_t rows) {
  bool changed = false;
  for (int64_t lane = 0; lane < rows; lane += W) {
    float* scores = w.scores + lane;
    const vi position = load(w.positions + lane);
    for (int64_t j = late; j < n; ++j) {
      const vf score = load(scores + j * s.lanes);
      store(scores + j * s.lanes, select(splat_int(w.places[j]) > position, splat(-infinity), score));
    }
    const vf before = load(w.top + lane);
    vf now = before;
    for (int64_t j = 0; j < n; ++j) now = maximum(load(scores + j * s.lanes), now);
    const vf base = select(now == splat(-infinity), vf{}, now);  // a query that sees nothing yet: all weights are 0
    vf total{};
    for (int64_t j = 0; j < n; ++j) {
      const vf weight = exp2(load(scores + j * s.lanes) - base);
      store(scores + j * s.lanes, weight);
      total += weight;
    }
    const vf fade = exp2(before - base);
    store(w.fade + lane, fade);
    store(w.sum + lane, load(w.sum + lane) * fade + total);
    store(w.top + lane, now);
    for (int l = 0; l < W; ++l) changed = changed || before[l] != now[l];
  }
  return changed;
}

// out[m] += sum over n keys of weight[j][m] values[j], V vectors of columns.
template <int M, int V>
__attribute__((noinline)) void weighted_tile(int64_t n, const float* weights, int64_t stride,
                                             const float* const* values, int64_t column, float* out,
                                             int64_t out_stride) {
  vf sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = load(out + m * out_stride + v * W);
  for (int64_t j = 0; j < n; ++j, weights += stride) {
    const float* row = values[j] + column;
    vf value[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) value[v] = load(row + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf weight = splat(weights[m]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] += weight * value[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + m * out_stride + v * W, sum[m][v]);
}

template <int M>
void add_values(Worker& w, const Sizes& s, int64_t n, int64_t rows) {
  for (int64_t r = 0; r < rows; r += M)
    for (int64_t e = 0; e < s.out_stride; e += NR) {
      float* out = w.out + r * s.out_stride + e;
      if (s.out_stride - e > W)
        weighted_tile<M, NV>(n, w.scores + r, s.lanes, w.values, e, out, s.out_stride);
      else
        weighted_tile<M, 1>(n, w.scores + r, s.lanes, w.values, e, out, s.out_stride);
    }
}

void values_at(const BlockSparseForward& c, Worker& w, const Sizes& s, const float* data, int64_t n) {
  rows_at(data, c.v.row_stride, w.places, n, w.values);
  if (!s.copied) return;
  for (int64_t j = 0; j < n; ++j) {
    float* to = w.copies + j * s.out_stride;
    for (int64_t e = 0; e < c.value_width; e += W) store(to + e, load_first(w.values[j] + e, c.value_width - e));
    w.values[j] = to;
  }
}

void run_tile(const BlockSparseForward& c, Worker& w, const Sizes& s, const float* keys, const float* values, int64_t n,
              int64_t first, int64_t rows) {
  const int64_t width = c.problem.width;
  rows_at(keys, c.problem.k.row_stride, w.places, n, w.keys);
  values_at(c, w, s, values, n);
  for (int64_t j = 0; !s.copied && j < n; ++j)
    for (int64_t e = 0; e < c.value_width; e += 16) fetch_soon(w.values[j], e);
  for (int64_t lane = 0; lane < rows; lane += NR)
    multiply_scattered(n, rows - lane, width, w.keys, w.query + lane * width, w.scores + lane, s.lanes);
  int64_t late = n;  // keys ascend
  while (late > 0 && w.places[late - 1] > first) --late;
  if (stream(w, s, n, late, rows))
    for (int64_t r = 0; r < rows; ++r) {
      const float fade = w.fade[r];
      float* out = w.out + r * s.out_stride;
      for (int64_t e = 0; e < s.out_stride; e += W) store(out + e, load(out + e) * fade);
    }
  if (c.value_width == 0) return;
  if (rows == 1)
    add_values<1>(w, s, n, rows);
  else
    add_values<SCATTERED>(w, s, n, rows);
}

void run_task(const BlockSparseForward& c, Worker& w, int64_t b, int64_t h, int64_t block,
              int64_t blocks) {
  const Sizes s(c);
  const SelectionProblem& p = c.problem;
  const int64_t head = b * p.query_heads + h, i0 = block * p.block_q, rows = smaller(p.block_q, p.queries - i0);
  const int64_t key_head = h / (p.query_heads / p.key_heads), first = i0 + p.offset;
  const int64_t count = c.counts[head * blocks + block], at_once = larger(1, TILE_KEYS / p.block_k);
  const int32_t* list = c.indices + (head * blocks + block) * c.capacity;
  const float *keys = selected_head(p.k, b, key_head), *values = selected_head(c.v, b, key_head);
  pack_transposed(selected_head(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, rows, p.width, nullptr, w.query,
                  w.scale);
  for (int64_t lane = 0; lane < s.lanes; ++lane) {
    const int64_t position = smaller(first + smaller(lane, rows - 1), INT32_MAX);  // keys are fewer
    w.positions[lane] = position < 0 ? -1 : static_cast<int32_t>(position);
  }
  for (int64_t lane = 0; lane < s.lanes; lane += W) {
    store(w.top + lane, splat(-infinity));
    store(w.sum + lane, vf{});
  }
  for (int64_t e = 0; e < s.lanes * s.out_stride; e += W) store(w.out + e, vf{});
  for (int64_t from = 0; from < count; from += at_once) {
    const int64_t n = keys_of(p, list, from, smaller(count, from + at_once), w.places);
    run_tile(c, w, s, keys, values, n, first, rows);
  }
  float* out = c.out.data + b * c.out.batch_stride + h * c.out.head_stride + i0 * c.out.row_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = w.sum[r] == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / w.sum[r];
    for (int64_t e = 0; e < c.value_width; e += W)
      store_first(out + r * c.out.row_stride + e, load(w.out + r * s.out_stride + e) * inverse, c.value_width - e);
    c.lse[head * p.queries + i0 + r] = empty ? -infinity : (w.top[r] + __builtin_log2f(w.sum[r])) * ln_2;
  }
}

}  // namespace

void block_sparse_forward(const BlockSparseForward& call, int threads) { for_each_block<Worker>(call, threads, run_task); }

}  // namespace VLM_LEVEL
}  // namespace vlm
