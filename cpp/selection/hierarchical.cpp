// Hierarchical search for key blocks. A task is (batch, head, block of queries). Compiled once per level.
#include "selection/block_tasks.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

struct Interval {
  int32_t first, end;
  float score;
};

// Higher scores first, of equal ones the earlier interval. NaN counts as lowest.
VLM_INLINE bool better(const Interval& a, const Interval& b) {
  return a.score > b.score || (!(b.score > a.score) && a.first < b.first);
}

void exchange_intervals(Interval& a, Interval& b) {
  const Interval kept = a;
  a = b;
  b = kept;
}

// The best `count` come to the front, in any order (Hoare's selection, middle element as pivot).
void bring_best_forward(Interval* list, int64_t size, int64_t count) {
  int64_t low = 0, high = size - 1;
  while (low < high) {
    const Interval pivot = list[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (better(list[i], pivot)) ++i;
      while (better(pivot, list[j])) --j;
      if (i <= j) exchange_intervals(list[i++], list[j--]);
    }
    if (count - 1 <= j)
      high = j;
    else if (count - 1 >= i)
      low = i;
    else
      return;
  }
}

void sort_blocks(int32_t* list, int64_t size) {  // heap sort: no template of the standard library in this unit
  const auto sink = [&](int64_t at, int64_t end) {
    while (2 * at + 1 < end) {
      int64_t child = 2 * at + 1;
      if (child + 1 < end && list[child + 1] > list[child]) ++child;
      if (list[at] >= list[child]) return;
      const int32_t kept = list[at];
      list[at] = list[child];
      list[child] = kept;
      at = child;
    }
  };
  for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i, size);
  for (int64_t end = size - 1; end > 0; --end) {
    const int32_t kept = list[0];
    list[0] = list[end];
    list[end] = kept;
    sink(0, end);
  }
}

struct Worker {
  float *query, *gathered, *panels, *scores;  // [rows], [BC, D], [BC panels], [MR, LDS]
  int32_t *keys, *blocks;                     // [BC], [2 budget]
  Interval* intervals;                        // [2 budget]
  float* best;                                // [BC]: greatest score of each key over the rows

  static int64_t room(const HierarchicalSelection& c, Worker* w, float* at) {
    const int64_t d = c.problem.width, rows = (c.problem.block_q + c.row_step - 1) / c.row_step;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats + 1, NR);
      return place;
    };
    w->query = take(packed_rows_room(rows, d) + NR);
    w->gathered = take(BC * d);
    w->panels = take(panels_room(BC, d) + NR);
    w->scores = take(MR * LDS);
    w->best = take(BC + W);
    w->keys = reinterpret_cast<int32_t*>(take(BC));
    w->blocks = reinterpret_cast<int32_t*>(take(2 * c.budget + 2));
    w->intervals = reinterpret_cast<Interval*>(take(3 * (2 * c.budget + 2)));
    return used;
  }
};

// Greatest <q, k> of each of `count` blocks of the worker's list, written to intervals[i].score.
void score_blocks(const HierarchicalSelection& c, Worker& w, const float* k, int64_t first_position, int64_t rows,
                  int64_t count) {
  const SelectionProblem& p = c.problem;
  const int64_t at_once = larger(1, BC / p.block_k);
  for (int64_t from = 0; from < count; from += at_once) {
    const int64_t to = smaller(count, from + at_once), n = columns_of(p, w.blocks, from, to, w.keys);
    gather_rows(k, p.k.row_stride, w.keys, n, p.width, w.gathered);
    pack_transposed(w.gathered, p.width, n, p.width, nullptr, w.panels);
    for (int64_t j = 0; j < n; j += W) store(w.best + j, splat(-infinity));
    for (int64_t g = 0; g < rows; g += MR) {
      const int64_t height = smaller(MR, rows - g);
      multiply<PackedRows>(height, n, p.width, w.query + g * p.width, 0, w.panels, NR * p.width, w.scores, LDS, false);
      for (int64_t r = 0; r < height; ++r) {
        const int64_t position = first_position + (g + r) * c.row_step;
        float* scores = w.scores + r * LDS;
        if (w.keys[n - 1] > position || c.problem.block_k > 1)
          for (int64_t j = 0; j < n; ++j)
            if (w.keys[j] > position) scores[j] = -infinity;
        for (int64_t j = 0; j < n; j += W) store(w.best + j, maximum(load(w.best + j), load(scores + j)));
      }
    }
    for (int64_t i = from, j = 0; i < to; ++i) {
      const int64_t size = smaller(p.keys, (w.blocks[i] + 1) * p.block_k) - w.blocks[i] * p.block_k;
      float best = -infinity;
      for (int64_t e = 0; e < size; ++e, ++j)
        if (w.best[j] > best) best = w.best[j];
      w.intervals[i].score = best;
    }
  }
}

// Chooses `budget` of the blocks [low, low + n) into `chosen`; returns how many representatives were scored.
int64_t search(const HierarchicalSelection& c, Worker& w, const float* k, int64_t first_position, int64_t rows,
               int64_t low, int64_t n, int32_t* chosen) {
  const int64_t m = c.budget;
  int64_t evaluations = 0, size = m;
  for (int64_t i = 0; i < m; ++i)
    w.intervals[i] = {static_cast<int32_t>(i * n / m), static_cast<int32_t>((i + 1) * n / m), 0.0f};
  for (bool long_ones = n > m; long_ones;) {
    size = m;
    for (int64_t i = 0; i < m; ++i) {
      const Interval whole = w.intervals[i];
      if (whole.end - whole.first < 2) continue;
      const int32_t middle = whole.first + (whole.end - whole.first) / 2;
      w.intervals[i].end = middle;
      w.intervals[size++] = {middle, whole.end, 0.0f};
    }
    for (int64_t i = 0; i < size; ++i) {
      const Interval& own = w.intervals[i];
      const int64_t inside = c.representative == Representative::center ? (own.end - own.first) / 2 : 0;
      w.blocks[i] = static_cast<int32_t>(low + own.first + inside);
    }
    score_blocks(c, w, k, first_position, rows, size);
    evaluations += size;
    bring_best_forward(w.intervals, size, m);
    long_ones = false;
    for (int64_t i = 0; i < m; ++i) long_ones = long_ones || w.intervals[i].end - w.intervals[i].first > 1;
  }
  for (int64_t i = 0; i < m; ++i) chosen[i] = static_cast<int32_t>(low + w.intervals[i].first);
  return evaluations;
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
    pack_rows(selected_head(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride * c.row_step, rows, p.width, 1.0f,
              w.query);
    const float* k = selected_head(p.k, b, h / (p.query_heads / p.key_heads));
    evaluations = search(c, w, k, first, rows, low, n, out + count);
    sort_blocks(out + count, c.budget);
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
