// Hierarchical search for key blocks: representatives are read where they lie, intervals stay in their order. A task is
// (batch, head, block of queries). Compiled once per level.
#include "selection/block_tasks.hpp"
#include "selection/ranks.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Intervals in ascending order. scores: of the representative, as far as it is known.
struct Intervals {
  int32_t *first, *end;
  float* scores;
};

struct Worker {
  float *query, *scores;        // panels of the rows that take part; [keys of a tile, NR]
  int32_t* positions;           // [rows in whole panels]
  int32_t *places, *blocks;     // [keys of a tile], [2 budget]: blocks to be scored
  int32_t* asked;               // [2 budget]: which halves they stand for
  const float** keys;           // addresses of a tile
  int32_t* order;               // [2 budget]: scores as integers of the same order
  float* found;                 // [2 budget]
  Intervals whole, halves;      // [budget], [2 budget]

  static int64_t room(const HierarchicalSelection& c, Worker* w, float* at) {
    const int64_t d = c.problem.width, lanes = round_up((c.problem.block_q + c.row_step - 1) / c.row_step, NR);
    const int64_t tile = larger(BC, c.problem.block_k), most = 2 * c.budget + W;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats + 1, NR);
      return place;
    };
    const auto integers = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(count)); };
    w->query = take(lanes * d + NR);
    w->scores = take(round_up(tile, SCATTERED) * NR);
    w->positions = integers(lanes);
    w->places = integers(tile);
    w->blocks = integers(most);
    w->asked = integers(most);
    w->keys = reinterpret_cast<const float**>(take(rows_room(tile)));
    w->order = integers(most);
    w->found = take(most);
    w->whole = {integers(most), integers(most), take(most)};
    w->halves = {integers(most), integers(most), take(most)};
    return used;
  }
};

// Greatest <q, k> of each of the first `count` blocks of the worker's list over its rows and the keys that they see,
// into w.found. NaN counts as lowest.
void score_blocks(const HierarchicalSelection& c, Worker& w, const float* k, int64_t rows, int64_t count) {
  const SelectionProblem& p = c.problem;
  const int64_t at_once = larger(1, BC / p.block_k);
  for (int64_t from = 0; from < count; from += at_once) {
    const int64_t to = smaller(count, from + at_once), n = keys_of(p, w.blocks, from, to, w.places);
    rows_at(k, p.k.row_stride, w.places, n, w.keys);
    const bool hidden = w.places[n - 1] > w.positions[0];  // both ascend: some row may not see some key
    for (int64_t i = from; i < to; ++i) w.found[i] = -infinity;
    for (int64_t lane = 0; lane < rows; lane += NR) {
      multiply_scattered(n, rows - lane, p.width, w.keys, w.query + lane * p.width, w.scores, NR);
      for (int64_t i = from, j = 0; i < to; ++i) {
        const int64_t end = j + smaller(p.keys, (w.blocks[i] + int64_t{1}) * p.block_k) - w.blocks[i] * p.block_k;
        vf best = splat(-infinity);
        for (; j < end; ++j)
          for (int64_t v = 0; v < NR && lane + v < rows; v += W) {
            vf score = load(w.scores + j * NR + v);
            if (hidden) score = select(splat_int(w.places[j]) > load(w.positions + lane + v), splat(-infinity), score);
            best = maximum(score, best);
          }
        const float top = max_lanes(best);
        if (top > w.found[i]) w.found[i] = top;
      }
    }
  }
}

// Keeps the m intervals of the best scores, of equal ones the earlier, in their order: `from` [size] -> `to` [m].
// Returns whether one of them is longer than 1.
bool keep_best(Worker& w, const Intervals& from, int64_t size, int64_t m, const Intervals& to) {
  order_of(from.scores, size, w.order);
  const Border found = border_of(w.order, size, m);
  const int32_t border = found.lowest;
  int64_t kept = 0, ties = found.ties;
  int32_t longest = 0;  // 0 if all that stay have length 1
  for (int64_t i = 0; i < size; ++i) {  // sign bits in place of branches: which ones stay cannot be foreseen
    const int32_t first = from.first[i], end = from.end[i];
    const int64_t behind = int64_t{border} - w.order[i];
    const int64_t stays = ((behind - (ties > 0)) >> 63) & 1, tie = stays & ~(behind >> 63);
    to.first[kept] = first;
    to.end[kept] = end;
    to.scores[kept] = from.scores[i];
    longest |= (end - first - 1) & static_cast<int32_t>(-stays);  // lengths are at least 1
    kept += stays;
    ties -= tie;
  }
  return longest != 0;
}

// Chooses `budget` of the blocks [low, low + n) into `chosen`, ascending; returns how many representatives were judged.
int64_t search(const HierarchicalSelection& c, Worker& w, const float* k, int64_t rows, int64_t low, int64_t n,
               int32_t* chosen) {
  const int64_t m = c.budget;
  const bool center = c.representative == Representative::center;
  const auto representative = [&](int32_t first, int32_t end) { return center ? first + (end - first) / 2 : first; };
  const Intervals &whole = w.whole, &halves = w.halves;
  for (int64_t i = 0; i < m; ++i) {
    whole.first[i] = static_cast<int32_t>(i * n / m);
    whole.end[i] = static_cast<int32_t>((i + 1) * n / m);
  }
  int64_t judged = 0, size = 0, asked = 0;
  bool known = false;  // the intervals of the start were never scored
  // A half may have the representative of its whole: then nothing is computed again.
  const auto add = [&](int32_t first, int32_t end, int32_t scored, float score) {
    const int32_t own = representative(first, end);
    halves.first[size] = first;
    halves.end[size] = end;
    halves.scores[size] = score;
    if (!known || own != scored) {
      w.blocks[asked] = static_cast<int32_t>(low + own);
      w.asked[asked++] = static_cast<int32_t>(size);
    }
    ++size;
  };
  for (bool long_ones = n > m; long_ones; known = true) {
    size = asked = 0;
    for (int64_t i = 0; i < m; ++i) {
      const int32_t first = whole.first[i], end = whole.end[i], middle = first + (end - first) / 2;
      const int32_t scored = representative(first, end);
      const float score = known ? whole.scores[i] : 0.0f;
      if (end - first > 1) add(first, middle, scored, score);
      add(end - first > 1 ? middle : first, end, scored, score);
    }
    score_blocks(c, w, k, rows, asked);
    for (int64_t i = 0; i < asked; ++i) halves.scores[w.asked[i]] = w.found[i];
    judged += size;
    long_ones = keep_best(w, halves, size, m, whole);
  }
  for (int64_t i = 0; i < m; ++i) chosen[i] = static_cast<int32_t>(low + whole.first[i]);
  return judged;
}

// Rows of the query block that take part, as panels; lanes beyond the last repeat the first, which changes no maximum.
void pack_queries(const HierarchicalSelection& c, Worker& w, const float* q, int64_t first, int64_t rows) {
  const int64_t d = c.problem.width;
  pack_transposed(q, c.problem.q.row_stride * c.row_step, rows, d, nullptr, w.query);
  for (int64_t lane = 0; lane < round_up(rows, NR); ++lane) {
    const int64_t position = smaller(first + (lane < rows ? lane * c.row_step : 0), INT32_MAX);  // keys are fewer
    w.positions[lane] = position < 0 ? -1 : static_cast<int32_t>(position);
    float* column = w.query + lane / NR * NR * d + lane % NR;
    for (int64_t e = 0; lane >= rows && e < d; ++e) column[e * NR] = w.query[e * NR];
  }
}

void run_task(const HierarchicalSelection& c, Worker& w, int64_t b, int64_t h, int64_t block, int64_t blocks) {
  const SelectionProblem& p = c.problem;
  const int64_t list = (b * p.query_heads + h) * blocks + block, i0 = block * p.block_q;
  const int64_t i1 = smaller(p.queries, i0 + p.block_q), key_blocks = (p.keys + p.block_k - 1) / p.block_k;
  int32_t* out = c.indices + list * c.capacity;
  const int64_t first = i0 + p.offset, last = smaller(p.keys - 1, i1 - 1 + p.offset);
  const int64_t seen = last < 0 ? 0 : last / p.block_k + 1;  // blocks that any row sees
  const int64_t low = smaller(seen, smaller(key_blocks, (c.sinks + p.block_k - 1) / p.block_k));
  // Without a window every block that is seen is a candidate.
  const int64_t near = c.window == 0 ? seen : smaller(seen, larger(0, first - c.window + 1) / p.block_k);
  const int64_t n = larger(0, near - low);
  int64_t count = 0, evaluations = 0;
  for (int64_t i = 0; i < low; ++i) out[count++] = static_cast<int32_t>(i);
  if (n <= c.budget) {
    for (int64_t i = 0; i < n; ++i) out[count++] = static_cast<int32_t>(low + i);
  } else if (c.budget > 0) {
    const int64_t rows = (i1 - i0 + c.row_step - 1) / c.row_step;
    pack_queries(c, w, selected_head(p.q, b, h) + i0 * p.q.row_stride, first, rows);
    const float* k = selected_head(p.k, b, h / (p.query_heads / p.key_heads));
    evaluations = search(c, w, k, rows, low, n, out + count);
    count += c.budget;
  }
  for (int64_t i = larger(low, near); i < seen; ++i) out[count++] = static_cast<int32_t>(i);
  c.counts[list] = static_cast<int32_t>(count);
  c.evaluations[list] = evaluations;
  for (int64_t i = count; i < c.capacity; ++i) out[i] = -1;
}

}  // namespace

void select_hierarchical(const HierarchicalSelection& call, int threads) { for_each_block<Worker>(call, threads, run_task); }

}  // namespace VLM_LEVEL
}  // namespace vlm
