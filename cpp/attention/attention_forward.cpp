// Exact attention forward: streaming softmax over key tiles. Compiled once per level.
//
// Work is (key head, query head of its group, block of queries), in this order, handed out in ranges. A worker keeps
// the packed keys and values of the last key head it met, tile by tile as they are first needed. Probabilities are
// rounded to the storage type before they meet the values; their sum is not.
#include "attention/attention_kernels.hpp"
#include "attention/attention_tiles.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t BLOCK_QUERIES = W == 16 ? 4 * MR : 8 * MR;

struct Plan {
  const AttentionForward& call;
  const AttentionProblem& p;
  KeyMasks masks;
  InverseLengths lengths;
  int64_t group, blocks;              // query heads of a key head, query blocks of a head
  int64_t key_tile, value_tile;       // steps of a packed tile
  int64_t out_stride;                 // of the accumulator
  Plan(const AttentionForward& c, int threads)
      : call(c),
        p(c.problem),
        masks(c.problem),
        lengths(c.problem, threads),
        group(p.query_heads / p.key_heads),
        blocks((p.queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES),
        key_tile(steps(p.width) * BC),
        value_tile(round_up(p.value_width, NR) * steps(BC)),
        out_stride(round_up(larger(p.value_width, 1), W)) {}
};

// What one worker owns.
struct Worker {
  int64_t head;           // batch * key_heads + key head whose tiles are packed, -1 for none
  uint8_t* packed;        // [tiles]
  float *keys, *values;   // packed tiles
  float *query;           // [BLOCK_QUERIES, width] in groups of MR
  float *scores;          // [MR, LDS]
  float *rounded;         // the same as a left operand, if that is a copy
  float *out;             // [BLOCK_QUERIES, out_stride]
  float *top, *sum;       // [BLOCK_QUERIES], streaming softmax in units of log 2

  static int64_t room(const Plan& s) {
    const int64_t tiles = s.masks.tiles;
    return round_up((tiles + 3) / 4, W) + tiles * (s.key_tile + s.value_tile) +
           round_up(BLOCK_QUERIES * steps(s.p.width), W) + MR * LDS + tile_rows_room(MR) +
           BLOCK_QUERIES * (s.out_stride + 2) + W;
  }
  static Worker make(const Plan& s, float* at) {
    const int64_t tiles = s.masks.tiles;
    Worker w;
    w.head = -1;
    w.packed = reinterpret_cast<uint8_t*>(at);
    w.keys = at + round_up((tiles + 3) / 4, W);
    w.values = w.keys + tiles * s.key_tile;
    w.query = w.values + tiles * s.value_tile;
    w.scores = w.query + round_up(BLOCK_QUERIES * steps(s.p.width), W);
    w.rounded = w.scores + MR * LDS;
    w.out = w.rounded + tile_rows_room(MR);
    w.top = w.out + BLOCK_QUERIES * s.out_stride;
    w.sum = w.top + BLOCK_QUERIES;
    return w;
  }
};

void need_tile(const Plan& s, Worker& w, int64_t b, int64_t key_head, int64_t tile) {
  const AttentionProblem& p = s.p;
  if (w.packed[tile]) return;
  const int64_t j0 = tile * BC, n = smaller(BC, p.keys - j0);
  const uint8_t* kept = s.masks.kept(b, j0);
  pack_right_transposed(stored(p.k, b, key_head) + j0 * p.k.row_stride, p.k.row_stride, n, p.width,
                        kept, w.keys + tile * s.key_tile, s.lengths.of_keys(b, key_head, j0));
  pack_right(stored(p.v, b, key_head) + j0 * p.v.row_stride, p.v.row_stride, n, p.value_width, kept,
             w.values + tile * s.value_tile, NR * steps(BC));
  w.packed[tile] = 1;
}

// One row of a group meets a tile: scores become probabilities relative to the running maximum.
VLM_INLINE void stream_row(float* scores, int64_t n, float* top, float* sum, float* out, int64_t out_width) {
  const int64_t padded = round_up(n, W);
  vf best = load(scores);
  for (int64_t c = W; c < padded; c += W) best = maximum(best, load(scores + c));
  const float before = *top, tile_top = max_lanes(best), now = tile_top > before ? tile_top : before;
  if (now == -infinity) {  // nothing allowed so far, or NaN, which then is the result of the row
    const float fill = any_nan(scores, n) ? not_a_number : 0.0f;
    for (int64_t c = 0; c < padded; c += W) store(scores + c, splat(fill));
    if (fill != fill) *top = *sum = fill;
    return;
  }
  const vf reference = splat(now);
  vf total{};
  for (int64_t c = 0; c < padded; c += W) {
    const vf weight = exp2(load(scores + c) - reference);
    store(scores + c, weight);
    total += weight;
  }
  if (before != now) {
    const float fade = __builtin_exp2f(before - now);
    *sum *= fade;
    for (int64_t e = 0; e < out_width; e += W) store(out + e, load(out + e) * fade);
    *top = now;
  }
  *sum += sum_lanes(total);
}

// The sum of a row is taken before, so that lse knows nothing of dropout.
void drop_row(float* weights, int64_t n, const AttentionProgram& program, int64_t i, int64_t j0) {
  const uint32_t row = row_key(program.drop_key, i);
  for (int64_t c = 0; c < n; c += W)
    store(weights + c,
          select(kept_lanes(row, j0 + c, program.drop_below), load(weights + c) * program.drop_scale, vf{}));
}

void run_block(const Plan& s, Worker& w, int64_t b, int64_t h, int64_t block) {
  const AttentionProblem& p = s.p;
  const int64_t key_head = h / s.group, i0 = block * BLOCK_QUERIES, rows = smaller(BLOCK_QUERIES, p.queries - i0);
  if (w.head != b * p.key_heads + key_head) {
    w.head = b * p.key_heads + key_head;
    for (int64_t t = 0; t < s.masks.tiles; ++t) w.packed[t] = 0;
  }
  const float factor = scale_of(p, h) * log2_e;
  pack_left(stored(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, rows, p.width, factor, w.query,
            s.lengths.of_queries(b, h, i0));
  for (int64_t r = 0; r < rows; ++r) {
    w.top[r] = -infinity;
    w.sum[r] = 0.0f;
  }
  for (int64_t e = 0; e < rows * s.out_stride; e += W) store(w.out + e, vf{});
  const AttentionProgram program = s.masks.program(p, b, h);
  for (int64_t tile = 0; tile < s.masks.tiles; ++tile) {
    const int64_t j0 = tile * BC, breadth = smaller(BC, p.keys - j0);
    const Cover cover = program.cover(i0, i0 + rows, j0, j0 + breadth, tile);
    if (cover == Cover::skip) continue;
    need_tile(s, w, b, key_head, tile);
    for (int64_t g = 0; g < rows; g += MR) {
      const int64_t height = smaller(MR, rows - g);
      const Columns seen = program.columns(i0 + g, i0 + g + height, j0, breadth, tile);
      const int64_t n = seen.last - seen.first, j = j0 + seen.first;
      if (n == 0) continue;
      Cover group = cover;
      if (cover == Cover::partial) group = program.cover(i0 + g, i0 + g + height, j, j + n, tile);
      if (group == Cover::skip) continue;
      multiply_packed(height, n, p.width, w.query + g * steps(p.width),
                      w.keys + tile * s.key_tile + seen.first * steps(p.width), w.scores, factor);
      for (int64_t r = 0; r < height; ++r) {
        const int64_t i = i0 + g + r;
        float* scores = w.scores + r * LDS;
        finish_scores(scores, n, bias_row(p.bias, b, h, i, j), program, group, i, j);
        stream_row(scores, n, w.top + g + r, w.sum + g + r, w.out + (g + r) * s.out_stride, s.out_stride);
        if (program.drop_below != 0) drop_row(scores, n, program, i, j);
      }
      multiply_rows(height, p.value_width, n, as_rows(w.scores, height, n, w.rounded),
                    w.values + tile * s.value_tile + steps(seen.first) * NR, NR * steps(BC), w.out + g * s.out_stride,
                    s.out_stride, true);
    }
  }
  Element* out = stored(s.call.out, b, h) + i0 * s.call.out.row_stride;
  float* lse = s.call.lse + (b * p.query_heads + h) * p.queries + i0;
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = w.top[r] == -infinity;
    const float inverse = empty ? 0.0f : 1.0f / w.sum[r];
    for (int64_t e = 0; e < p.value_width; e += W)
      store_first(out + r * s.call.out.row_stride + e, load(w.out + r * s.out_stride + e) * inverse,
                  p.value_width - e);
    const float log_sum = empty ? 0.0f : __builtin_log2f(w.sum[r]);
    lse[r] = empty ? -infinity : (w.top[r] + log_sum) * ln_2;
    if (s.call.top == nullptr) continue;
    s.call.top[lse - s.call.lse + r] = w.top[r];
    s.call.log_sum[lse - s.call.lse + r] = log_sum;
  }
}

}  // namespace

void attention_forward(const AttentionForward& call, int threads) {
  threads = useful_threads(call.problem, threads);
  const Plan plan(call, threads);
  const int64_t per_key_head = plan.group * plan.blocks, total = plan.p.batch * plan.p.key_heads * per_key_head;
  const int64_t grain = larger(1, smaller(per_key_head, (total + 4 * threads - 1) / (4 * threads)));
  const int64_t room = round_up(Worker::room(plan), W);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(Worker) / sizeof(float) + 1));
  Worker* workers = reinterpret_cast<Worker*>(owners.data);
  for (int t = 0; t < threads; ++t) workers[t] = Worker::make(plan, memory.data + t * room);
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / per_key_head, rest = task % per_key_head;
      const int64_t b = key_head / plan.p.key_heads;
      const int64_t h = (key_head % plan.p.key_heads) * plan.group + rest / plan.blocks;
      run_block(plan, workers[worker], b, h, rest % plan.blocks);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
