// Attention over listed key blocks: keys and values are gathered into tiles, then as exact attention. Compiled once per
// level. A task is (batch, head, block of queries).
#include "selection/block_tasks.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

struct Worker {
  float *query, *gathered, *keys, *values, *scores, *out, *top, *sum;
  int32_t* places;

  static int64_t room(const BlockSparseForward& c, Worker* w, float* at) {
    const int64_t d = c.problem.width, rows = c.problem.block_q;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats + 1, NR);
      return place;
    };
    w->query = take(packed_rows_room(rows, d) + NR);
    w->gathered = take(BC * larger(d, c.value_width));
    w->keys = take(panels_room(BC, d) + NR);
    w->values = take(round_up(c.value_width, NR) * BC);
    w->scores = take(MR * LDS);
    w->out = take(rows * round_up(larger(c.value_width, 1), NR));
    w->top = take(rows);
    w->sum = take(rows);
    w->places = reinterpret_cast<int32_t*>(take(BC));
    return used;
  }
};

// Scores of a row become weights relative to the running maximum; see C0 of the streaming softmax.
void stream(float* scores, int64_t n, int64_t position, const int32_t* places, float* top, float* sum, float* out,
            int64_t width) {
  const int64_t padded = round_up(n, W);
  for (int64_t j = 0; j < n; ++j)
    if (places[j] > position) scores[j] = -infinity;
  for (int64_t j = n; j < padded; ++j) scores[j] = -infinity;
  vf best = load(scores);
  for (int64_t j = W; j < padded; j += W) best = maximum(best, load(scores + j));
  const float before = *top, here = max_lanes(best), now = here > before ? here : before;
  if (now == -infinity) {
    for (int64_t j = 0; j < padded; j += W) store(scores + j, vf{});
    return;
  }
  vf total{};
  for (int64_t j = 0; j < padded; j += W) {
    const vf weight = exp2(load(scores + j) - splat(now));
    store(scores + j, weight);
    total += weight;
  }
  if (before != now) {
    const float fade = __builtin_exp2f(before - now);
    *sum *= fade;
    for (int64_t e = 0; e < width; e += W) store(out + e, load(out + e) * fade);
    *top = now;
  }
  *sum += sum_lanes(total);
}

void run_task(const BlockSparseForward& c, Worker& w, int64_t b, int64_t h, int64_t block, int64_t blocks) {
  const SelectionProblem& p = c.problem;
  const int64_t head = b * p.query_heads + h, i0 = block * p.block_q, rows = smaller(p.block_q, p.queries - i0);
  const int64_t stride = round_up(larger(c.value_width, 1), NR), key_head = h / (p.query_heads / p.key_heads);
  const int64_t count = c.counts[head * blocks + block], at_once = larger(1, BC / p.block_k);
  const int32_t* list = c.indices + (head * blocks + block) * c.capacity;
  pack_rows(selected_head(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, rows, p.width, c.scale * log2_e, w.query);
  for (int64_t r = 0; r < rows; ++r) {
    w.top[r] = -infinity;
    w.sum[r] = 0.0f;
  }
  for (int64_t e = 0; e < rows * stride; e += W) store(w.out + e, vf{});
  for (int64_t from = 0; from < count; from += at_once) {
    const int64_t n = columns_of(p, list, from, smaller(count, from + at_once), w.places);
    gather_rows(selected_head(p.k, b, key_head), p.k.row_stride, w.places, n, p.width, w.gathered);
    pack_transposed(w.gathered, p.width, n, p.width, nullptr, w.keys);
    gather_rows(selected_head(c.v, b, key_head), c.v.row_stride, w.places, n, c.value_width, w.gathered);
    pack_plain(w.gathered, c.value_width, n, c.value_width, nullptr, w.values, NR * BC);
    for (int64_t g = 0; g < rows; g += MR) {
      const int64_t height = smaller(MR, rows - g);
      multiply<PackedRows>(height, n, p.width, w.query + g * p.width, 0, w.keys, NR * p.width, w.scores, LDS, false);
      for (int64_t r = 0; r < height; ++r)
        stream(w.scores + r * LDS, n, i0 + g + r + p.offset, w.places, w.top + g + r, w.sum + g + r,
               w.out + (g + r) * stride, stride);
      multiply<TileRows>(height, c.value_width, n, w.scores, 0, w.values, NR * BC, w.out + g * stride, stride, true);
    }
  }
  float* out = c.out.data + b * c.out.batch_stride + h * c.out.head_stride + i0 * c.out.row_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = w.top[r] == -infinity;
    const float inverse = empty ? 0.0f : 1.0f / w.sum[r];
    for (int64_t e = 0; e < c.value_width; e += W)
      store_first(out + r * c.out.row_stride + e, load(w.out + r * stride + e) * inverse, c.value_width - e);
    c.lse[head * p.queries + i0 + r] = empty ? -infinity : (w.top[r] + __builtin_log2f(w.sum[r])) * ln_2;
  }
}

}  // namespace

void block_sparse_forward(const BlockSparseForward& call, int threads) { for_each_block<Worker>(call, threads, run_task); }

}  // namespace VLM_LEVEL
}  // namespace vlm
