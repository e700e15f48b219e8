// Weighted column sums of the attention matrix, recomputed tile by tile. Compiled once per level.
//
// Work is (batch, query head, key tile), in this order, handed out in ranges: a column has one writer. A worker keeps
// the packed queries of the last head it met.
#include "attention/attention_tiles.hpp"
#include "attention/statistics_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t BLOCK_QUERIES = 16 * MR;

struct Plan {
  const AttentionColumnSums& call;
  const AttentionProblem& p;
  KeyMasks masks;
  int64_t group;
  const float *top = nullptr, *log_sum = nullptr;  // of each row, instead of lse; null = lse is exact enough
  explicit Plan(const AttentionColumnSums& c)
      : call(c), p(c.problem), masks(c.problem), group(p.query_heads / p.key_heads) {}
};

struct Worker {
  int64_t head;    // batch * query_heads + head whose queries are packed, -1 for none
  float *query;    // [queries, width] in groups of MR
  float *keys;     // one packed tile
  float *scores;   // [MR, LDS]
  float *part, *total;  // [BC]: sums of a block of queries, and of all so far

  static int64_t room(const Plan& s) {
    return round_up(packed_rows_room(s.p.queries, s.p.width), W) + s.p.width * BC + MR * LDS + 2 * BC;
  }
  static Worker make(const Plan& s, float* at) {
    Worker w;
    w.head = -1;
    w.query = at;
    w.keys = w.query + round_up(packed_rows_room(s.p.queries, s.p.width), W);
    w.scores = w.keys + s.p.width * BC;
    w.part = w.scores + MR * LDS;
    w.total = w.part + BC;
    return w;
  }
};

// The rows of a group that count: their scores, weights and lse in units of log 2.
struct ActiveRows {
  int count;
  int row[MR];
  float weight[MR], lse[MR], rest[MR];  // P = 2^(score - lse - rest)
};

ActiveRows active_rows(const Plan& s, int64_t head, int64_t i0, int64_t height) {
  ActiveRows active;
  active.count = 0;
  for (int64_t r = 0; r < height; ++r) {
    const int64_t at = head * s.p.queries + i0 + r;
    const float weight = s.call.weights == nullptr ? 1.0f : s.call.weights[at], lse = s.call.lse[at];
    if (weight == 0.0f || lse == -infinity) continue;
    active.row[active.count] = static_cast<int>(r);
    active.weight[active.count] = weight;
    active.lse[active.count] = s.top == nullptr ? lse * log2_e : s.top[at];
    active.rest[active.count] = s.top == nullptr ? 0.0f : s.log_sum[at];
    ++active.count;
  }
  return active;
}

void sum_tile(const Plan& s, Worker& w, int64_t b, int64_t h, int64_t tile) {
  const AttentionProblem& p = s.p;
  const int64_t head = b * p.query_heads + h, j0 = tile * BC, breadth = smaller(BC, p.keys - j0);
  const AttentionProgram program = s.masks.program(p, b, h);
  if (w.head != head) {
    w.head = head;
    pack_rows(head_of(p.q, b, h), p.q.row_stride, p.queries, p.width, p.scale * log2_e, w.query);
  }
  for (int64_t c = 0; c < BC; c += W) store(w.total + c, vf{});
  bool packed = false;
  for (int64_t i0 = 0; i0 < p.queries; i0 += BLOCK_QUERIES) {
    const int64_t rows = smaller(BLOCK_QUERIES, p.queries - i0);
    const Cover cover = program.cover(i0, i0 + rows, j0, j0 + breadth, tile);
    if (cover == Cover::skip) continue;
    if (!packed) {
      pack_transposed(head_of(p.k, b, h / s.group) + j0 * p.k.row_stride, p.k.row_stride, breadth, p.width,
                      s.masks.kept(b, j0), w.keys);
      packed = true;
    }
    for (int64_t c = 0; c < BC; c += W) store(w.part + c, vf{});
    for (int64_t g = 0; g < rows; g += MR) {
      const int64_t height = smaller(MR, rows - g), n = program.causal.seen(i0 + g + height - 1, j0, breadth);
      const ActiveRows active = active_rows(s, head, i0 + g, height);
      if (n == 0 || active.count == 0) continue;
      multiply<PackedRows>(height, n, p.width, w.query + (i0 + g) * p.width, 0, w.keys, NR * p.width, w.scores, LDS,
                           false);
      for (int a = 0; a < active.count; ++a) {
        const int64_t i = i0 + g + active.row[a];
        finish_scores(w.scores + active.row[a] * LDS, n, bias_row(p.bias, b, h, i, j0), program, cover, i, j0);
      }
      for (int64_t c = 0; c < n; c += W) {
        vf sum{};
        for (int a = 0; a < active.count; ++a)
          sum += exp2(load(w.scores + active.row[a] * LDS + c) - active.lse[a] - active.rest[a]) * active.weight[a];
        store(w.part + c, load(w.part + c) + sum);
      }
    }
    for (int64_t c = 0; c < BC; c += W) store(w.total + c, load(w.total + c) + load(w.part + c));
  }
  float* sums = s.call.sums + head * p.keys + j0;
  for (int64_t c = 0; c < breadth; c += W) store_first(sums + c, load(w.total + c), breadth - c);
}

}  // namespace

void attention_column_sums(const AttentionColumnSums& call, int threads) {
  Plan plan(call);
  const AttentionProblem& p = plan.p;
  const int64_t lse_count = p.batch * p.query_heads * p.queries;
  const bool split = needs_split(p, call.lse);
  Scratch halves(split ? 3 * lse_count : 0);
  if (split) {
    AttentionRowStatistics again{p, halves.data, nullptr, nullptr};
    again.top = halves.data + lse_count;
    again.log_sum = halves.data + 2 * lse_count;
    VLM_LEVEL::attention_row_statistics(again, threads);
    plan.top = again.top;
    plan.log_sum = again.log_sum;
  }
  threads = useful_threads(p, threads);
  const int64_t tiles = plan.masks.tiles, total = p.batch * p.query_heads * tiles;
  const int64_t grain = larger(1, smaller(tiles, (total + 4 * threads - 1) / (4 * threads)));
  const int64_t room = round_up(Worker::room(plan), W);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(Worker) / sizeof(float) + 1));
  Worker* workers = reinterpret_cast<Worker*>(owners.data);
  for (int t = 0; t < threads; ++t) workers[t] = Worker::make(plan, memory.data + t * room);
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tiles;
      sum_tile(plan, workers[worker], head / p.query_heads, head % p.query_heads, task % tiles);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
