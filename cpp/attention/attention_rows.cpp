// Statistics of attention rows in one streaming pass, and chosen rows of the attention matrix. Compiled once per level.
#include "attention/attention_tiles.hpp"
#include "attention/statistics_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t BLOCK_QUERIES = W == 16 ? 4 * MR : 8 * MR;

// ---- row statistics: as the forward pass, without values. Work is (batch, query head, block of queries).

struct StatisticsPlan {
  const AttentionRowStatistics& call;
  const AttentionProblem& p;
  KeyMasks masks;
  int64_t group, blocks, key_tile;
  explicit StatisticsPlan(const AttentionRowStatistics& c)
      : call(c),
        p(c.problem),
        masks(c.problem),
        group(p.query_heads / p.key_heads),
        blocks((p.queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES),
        key_tile(p.width * BC) {}
};

// Streaming softmax of one row in units of log 2. `drift` is sum_j 2^(s_j - top) (s_j - top).
struct RowState {
  float top, sum, drift;
  int64_t best;
};

struct StatisticsWorker {
  int64_t head;      // batch * key_heads + key head whose tiles are packed, -1 for none
  uint8_t* packed;   // [tiles]
  float *keys, *query, *scores;
  RowState* state;   // [BLOCK_QUERIES]

  static int64_t state_room() {
    return round_up(BLOCK_QUERIES * static_cast<int64_t>(sizeof(RowState) / sizeof(float)), W);
  }
  static int64_t room(const StatisticsPlan& s) {
    return round_up((s.masks.tiles + 3) / 4, W) + s.masks.tiles * s.key_tile +
           round_up(packed_rows_room(BLOCK_QUERIES, s.p.width), W) + MR * LDS + state_room();
  }
  static StatisticsWorker make(const StatisticsPlan& s, float* at) {
    StatisticsWorker w;
    w.head = -1;
    w.packed = reinterpret_cast<uint8_t*>(at);
    w.keys = at + round_up((s.masks.tiles + 3) / 4, W);
    w.query = w.keys + s.masks.tiles * s.key_tile;
    w.scores = w.query + round_up(packed_rows_room(BLOCK_QUERIES, s.p.width), W);
    w.state = reinterpret_cast<RowState*>(w.scores + MR * LDS);
    return w;
  }
};

template <bool Entropy>
VLM_INLINE void stream(const float* scores, int64_t n, int64_t j0, bool want_best, RowState& row) {
  const int64_t padded = round_up(n, W);
  vf highest = load(scores);
  for (int64_t c = W; c < padded; c += W) highest = maximum(highest, load(scores + c));
  const float tile_top = max_lanes(highest), before = row.top;
  if (tile_top > before) {
    if (before != -infinity) {
      const float fade = __builtin_exp2f(before - tile_top);
      row.drift = fade == 0.0f ? 0.0f : fade * (row.drift + row.sum * (before - tile_top));  // 0 * -inf is not 0
      row.sum *= fade;
    }
    row.top = tile_top;
    if (want_best) {
      int64_t c = 0;
      while (c + 1 < n && scores[c] != tile_top) ++c;
      row.best = j0 + c;
    }
  }
  if (row.top == -infinity) {
    if (any_nan(scores, n)) row.top = row.sum = row.drift = not_a_number;
    return;
  }
  vf sum{}, drift{};
  for (int64_t c = 0; c < padded; c += W) {
    const vf below = load(scores + c) - row.top, weight = exp2(below);
    sum += weight;
    if constexpr (Entropy) drift += weight * maximum(below, splat(-126.0f));  // 0 * -inf is not 0
  }
  row.sum += sum_lanes(sum);
  if constexpr (Entropy) row.drift += sum_lanes(drift);
}

void run_block(const StatisticsPlan& s, StatisticsWorker& w, int64_t b, int64_t h, int64_t block) {
  const AttentionProblem& p = s.p;
  const int64_t key_head = h / s.group, i0 = block * BLOCK_QUERIES, rows = smaller(BLOCK_QUERIES, p.queries - i0);
  if (w.head != b * p.key_heads + key_head) {
    w.head = b * p.key_heads + key_head;
    for (int64_t t = 0; t < s.masks.tiles; ++t) w.packed[t] = 0;
  }
  pack_rows(head_of(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, rows, p.width, p.scale * log2_e, w.query);
  for (int64_t r = 0; r < rows; ++r) w.state[r] = RowState{-infinity, 0.0f, 0.0f, -1};
  const AttentionProgram program = s.masks.program(p, b, h);
  const bool want_best = s.call.best != nullptr;
  for (int64_t tile = 0; tile < s.masks.tiles; ++tile) {
    const int64_t j0 = tile * BC, breadth = smaller(BC, p.keys - j0);
    const Cover cover = program.cover(i0, i0 + rows, j0, j0 + breadth, tile);
    if (cover == Cover::skip) continue;
    if (!w.packed[tile]) {
      pack_transposed(head_of(p.k, b, key_head) + j0 * p.k.row_stride, p.k.row_stride, breadth, p.width,
                      s.masks.kept(b, j0), w.keys + tile * s.key_tile);
      w.packed[tile] = 1;
    }
    for (int64_t g = 0; g < rows; g += MR) {
      const int64_t height = smaller(MR, rows - g), n = program.causal.seen(i0 + g + height - 1, j0, breadth);
      if (n == 0) continue;
      multiply<PackedRows>(height, n, p.width, w.query + g * p.width, 0, w.keys + tile * s.key_tile, NR * p.width,
                           w.scores, LDS, false);
      for (int64_t r = 0; r < height; ++r) {
        float* scores = w.scores + r * LDS;
        finish_scores(scores, n, bias_row(p.bias, b, h, i0 + g + r, j0), program, cover, i0 + g + r, j0);
        if (s.call.entropy != nullptr)
          stream<true>(scores, n, j0, want_best, w.state[g + r]);
        else
          stream<false>(scores, n, j0, want_best, w.state[g + r]);
      }
    }
  }
  const int64_t at = (b * p.query_heads + h) * p.queries + i0;
  for (int64_t r = 0; r < rows; ++r) {
    const RowState& row = w.state[r];
    const bool empty = row.top == -infinity;
    const float log_sum = empty ? 0.0f : __builtin_log2f(row.sum);
    s.call.lse[at + r] = empty ? -infinity : (row.top + log_sum) * ln_2;
    if (s.call.top != nullptr) {
      s.call.top[at + r] = row.top;
      s.call.log_sum[at + r] = log_sum;
    }
    if (s.call.entropy != nullptr) {
      const float entropy = empty ? 0.0f : (log_sum - row.drift / row.sum) * ln_2;
      s.call.entropy[at + r] = entropy < 0.0f ? 0.0f : entropy;
    }
    if (want_best) s.call.best[at + r] = row.best;
  }
}

// ---- chosen rows. Work is (batch, key head): the rows of all its query heads meet each tile of keys together.

struct RowsWorker {
  float *keys;    // one packed tile
  float *chosen;  // [MR, width], rows as they come
  float *query;   // all rows packed in groups of MR
  float *scores;  // [MR, LDS]
  AttentionProgram* programs;  // [heads of a group]

  static int64_t group(const AttentionRows& c) { return c.problem.query_heads / c.problem.key_heads; }
  static int64_t stacked(const AttentionRows& c) { return group(c) * c.count; }
  static int64_t room(const AttentionRows& c) {
    return c.problem.width * (BC + MR) + packed_rows_room(stacked(c), c.problem.width) + MR * LDS + 3 * W +
           group(c) * static_cast<int64_t>(sizeof(AttentionProgram) / sizeof(float));
  }
  static RowsWorker make(const AttentionRows& c, float* at) {
    RowsWorker w;
    w.keys = at;
    w.chosen = w.keys + c.problem.width * BC;
    w.query = w.chosen + round_up(MR * c.problem.width, W);
    w.scores = w.query + round_up(packed_rows_room(stacked(c), c.problem.width), W);
    w.programs = reinterpret_cast<AttentionProgram*>(w.scores + MR * LDS);
    return w;
  }
};

void soften(float* row, int64_t n) {
  vf highest = splat(-infinity);
  for (int64_t c = 0; c + W <= n; c += W) highest = maximum(highest, load(row + c));
  float top = max_lanes(highest);
  for (int64_t c = n / W * W; c < n; ++c) top = row[c] > top ? row[c] : top;
  if (top == -infinity) {
    const float fill = any_nan(row, n) ? not_a_number : 0.0f;
    for (int64_t c = 0; c < n; ++c) row[c] = fill;
    return;
  }
  vf sum{};
  float rest = 0.0f;
  for (int64_t c = 0; c < n; c += W) {
    const vf weight = exp2(load_first(row + c, n - c) - top);
    store_first(row + c, weight, n - c);
    if (n - c >= W)
      sum += weight;
    else
      for (int64_t l = 0; l < n - c; ++l) rest += weight[l];
  }
  const float inverse = 1.0f / (sum_lanes(sum) + rest);
  for (int64_t c = 0; c < n; c += W) store_first(row + c, load_first(row + c, n - c) * inverse, n - c);
}

void run_head(const AttentionRows& call, const KeyMasks& masks, RowsWorker& w, int64_t b, int64_t key_head) {
  const AttentionProblem& p = call.problem;
  const int64_t group = p.query_heads / p.key_heads, stacked = group * call.count;
  const int64_t* rows = call.rows + b * call.count;
  float* out = call.probabilities + (b * p.query_heads + key_head * group) * call.count * p.keys;
  for (int64_t h = 0; h < group; ++h) w.programs[h] = masks.program(p, b, key_head * group + h);
  for (int64_t g = 0; g < stacked; g += MR) {
    const int64_t height = smaller(MR, stacked - g);
    for (int64_t r = 0; r < height; ++r) {
      const int64_t i = rows[(g + r) % call.count], h = key_head * group + (g + r) / call.count;
      const float* from = i < 0 ? nullptr : head_of(p.q, b, h) + i * p.q.row_stride;
      for (int64_t e = 0; e < p.width; ++e) w.chosen[r * p.width + e] = i < 0 ? 0.0f : from[e];
    }
    pack_rows(w.chosen, p.width, height, p.width, p.scale * log2_e, w.query + g * p.width);
  }
  for (int64_t tile = 0; tile < masks.tiles; ++tile) {
    const int64_t j0 = tile * BC, breadth = smaller(BC, p.keys - j0);
    bool packed = false;
    for (int64_t g = 0; g < stacked; g += MR) {
      const int64_t height = smaller(MR, stacked - g);
      bool multiplied = false;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t i = rows[(g + r) % call.count], h = key_head * group + (g + r) / call.count;
        const AttentionProgram& program = w.programs[(g + r) / call.count];
        const Cover cover = i < 0 ? Cover::skip : program.cover(i, i + 1, j0, j0 + breadth, tile);
        float* to = out + (g + r) * p.keys + j0;
        if (cover == Cover::skip) {
          for (int64_t c = 0; c < breadth; ++c) to[c] = -infinity;
          continue;
        }
        if (!packed)
          pack_transposed(head_of(p.k, b, key_head) + j0 * p.k.row_stride, p.k.row_stride, breadth, p.width,
                          masks.kept(b, j0), w.keys);
        packed = true;
        if (!multiplied)
          multiply<PackedRows>(height, breadth, p.width, w.query + g * p.width, 0, w.keys, NR * p.width, w.scores, LDS,
                               false);
        multiplied = true;
        float* scores = w.scores + r * LDS;
        finish_scores(scores, breadth, bias_row(p.bias, b, h, i, j0), program, cover, i, j0);
        for (int64_t c = 0; c < breadth; c += W) store_first(to + c, load(scores + c), breadth - c);
      }
    }
  }
  for (int64_t r = 0; r < stacked; ++r) soften(out + r * p.keys, p.keys);
}

}  // namespace

void attention_row_statistics(const AttentionRowStatistics& call, int threads) {
  const StatisticsPlan plan(call);
  const AttentionProblem& p = plan.p;
  threads = useful_threads(p, threads);
  const int64_t per_head = plan.blocks, total = p.batch * p.query_heads * per_head;
  const int64_t grain = larger(1, smaller(per_head * plan.group, (total + 4 * threads - 1) / (4 * threads)));
  const int64_t room = round_up(StatisticsWorker::room(plan), W);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(StatisticsWorker) / sizeof(float) + 1));
  StatisticsWorker* workers = reinterpret_cast<StatisticsWorker*>(owners.data);
  for (int t = 0; t < threads; ++t) workers[t] = StatisticsWorker::make(plan, memory.data + t * room);
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / per_head;
      run_block(plan, workers[worker], head / p.query_heads, head % p.query_heads, task % per_head);
    }
  });
}

void attention_rows(const AttentionRows& call, int threads) {
  const AttentionProblem& p = call.problem;
  const KeyMasks masks(p);
  if (static_cast<double>(p.batch) * p.query_heads * call.count * p.keys * p.width < 1e6) threads = 1;
  const int64_t room = round_up(RowsWorker::room(call), W);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(RowsWorker) / sizeof(float) + 1));
  RowsWorker* workers = reinterpret_cast<RowsWorker*>(owners.data);
  for (int t = 0; t < threads; ++t) workers[t] = RowsWorker::make(call, memory.data + t * room);
  parallel_for(p.batch * p.key_heads, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task)
      run_head(call, masks, workers[worker], task / p.key_heads, task % p.key_heads);
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
