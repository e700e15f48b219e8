// Softmax contrastive statistics (InfoNCE) with plain targets: ids alone. Compiled once per level.
#include "contrastive/pair_kernels.hpp"
#include "contrastive/pair_softmax.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Streaming log-sum-exp and the sum over positives, for many rows or columns.
struct Statistics {
  float *maximum, *sum, *positives;

  static int64_t room(int64_t n) { return 3 * n; }
  static Statistics at(float* data, int64_t n) { return {data, data + n, data + 2 * n}; }
  void clear(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      maximum[i] = -infinity;
      sum[i] = positives[i] = 0.0f;
    }
  }
};

struct Forward {
  const PairTargets& targets;
  Statistics rows;
  float* column_parts;  // Statistics for each chunk, null if not wanted
  int64_t columns;      // padded

  Statistics columns_of(int64_t chunk) const {
    return Statistics::at(column_parts + chunk * Statistics::room(columns), columns);
  }

  void forward_tile(const LogitTile& t) {
    const int64_t padded = round_up(t.breadth, W);
    for (int64_t r = 0; r < t.height; ++r) {
      for (int64_t c = t.breadth; c < padded; ++c) t.data[r * LDS + c] = -infinity;
      add_row(t.data + r * LDS, t.row + r, t.column, padded);
    }
    if (column_parts == nullptr) return;
    const Statistics state = columns_of(t.chunk);
    for (int64_t c = 0; c < padded; c += W) add_columns(t, c, state);
  }

  void add_row(const float* z, int64_t row, int64_t column, int64_t padded) {
    vf top = load(z);
    for (int64_t c = W; c < padded; c += W) top = maximum(top, load(z + c));
    const float before = rows.maximum[row], now = max_lanes(top) > before ? max_lanes(top) : before;
    const vf reference = splat(now);
    const vi id = splat_int(targets.row_ids[row]);
    vf sum{}, positives{};
    for (int64_t c = 0; c < padded; c += W) {
      const vf value = load(z + c);
      sum += exp(value - reference);
      positives += select(load(targets.column_ids + column + c) == id, value, vf{});
    }
    rows.sum[row] = rows.sum[row] * __builtin_expf(before - now) + sum_lanes(sum);
    rows.maximum[row] = now;
    rows.positives[row] += sum_lanes(positives);
  }

  void add_columns(const LogitTile& t, int64_t c, const Statistics& state) {
    const int64_t at = t.column + c;
    const vf before = load(state.maximum + at);
    const vi ids = load(targets.column_ids + at);
    vf now = before;
    for (int64_t r = 0; r < t.height; ++r) now = maximum(now, load(t.data + r * LDS + c));
    vf sum = load(state.sum + at) * exp(before - now), positives = load(state.positives + at);
    for (int64_t r = 0; r < t.height; ++r) {
      const vf value = load(t.data + r * LDS + c);
      sum += exp(value - now);
      positives += select(splat_int(targets.row_ids[t.row + r]) == ids, value, vf{});
    }
    store(state.maximum + at, now);
    store(state.sum + at, sum);
    store(state.positives + at, positives);
  }

  void merge_columns(int64_t chunks, int64_t column, float* lse, float* positives) const {
    float top = -infinity, sum = 0.0f, positive_sum = 0.0f;
    for (int64_t k = 0; k < chunks; ++k) top = __builtin_fmaxf(top, columns_of(k).maximum[column]);
    for (int64_t k = 0; k < chunks; ++k) {
      const Statistics part = columns_of(k);
      if (part.maximum[column] != -infinity) sum += part.sum[column] * __builtin_expf(part.maximum[column] - top);
      positive_sum += part.positives[column];
    }
    *lse = top + __builtin_logf(sum);
    *positives = positive_sum;
  }
};

struct Backward {
  const PairTargets& targets;
  SoftmaxSide rows, columns;
  float scale;
  double* scale_gradients;  // for each chunk

  void gradient_tile(const LogitTile& t) {
    double total = 0.0;
    for (int64_t r = 0; r < t.height; ++r) total += gradient_row(t.data + r * LDS, t.row + r, t.column, t.breadth);
    scale_gradients[t.chunk] += total;
  }

  float gradient_row(float* z, int64_t row, int64_t column, int64_t breadth) {
    const vf lse = splat(rows.lse[row]), weight = splat(rows.weight[row]), share = splat(rows.positive[row]);
    const vi id = splat_int(targets.row_ids[row]);
    vf sum{};
    for (int64_t c = 0; c < breadth; c += W) {
      const int64_t at = column + c;
      const vf value = load(z + c);
      vf g = weight * exp(value - lse) + load(columns.weight + at) * exp(value - load(columns.lse + at));
      g += select(load(targets.column_ids + at) == id, share + load(columns.positive + at), vf{});
      if (c + W > breadth) g = select(lanes_below(breadth - c), g, vf{});
      sum += g * value;
      store(z + c, g * scale);
    }
    return sum_lanes(sum);
  }
};

}  // namespace

void softmax_pair_forward(const PairForward& call, const PairTargets& targets, int threads) {
  if (!targets.plain) return softmax_full_forward(call, targets, threads);
  const PairProblem& p = call.problem;
  const int64_t R = p.rows, C = p.columns, chunks = cut_rows(R).count, columns = round_up(C, W);
  const bool want_columns = call.columns != nullptr;
  Scratch row_state(Statistics::room(R)), column_state(want_columns ? chunks * Statistics::room(columns) : 0);
  Forward rule{targets, Statistics::at(row_state.data, R), want_columns ? column_state.data : nullptr, columns};
  rule.rows.clear(R);
  for (int64_t k = 0; want_columns && k < chunks; ++k) rule.columns_of(k).clear(columns);
  sweep_forward(p, rule, true, threads);
  for (int64_t i = 0; i < PAIR_NUMBERS * R; ++i) call.rows[i] = 0.0f;
  for (int64_t i = 0; i < R; ++i) {
    call.rows[i] = rule.rows.maximum[i] + __builtin_logf(rule.rows.sum[i]);
    call.rows[R + i] = rule.rows.positives[i];
    call.rows[4 * R + i] = targets.row_count[i];
  }
  if (!want_columns) return;
  for (int64_t j = 0; j < PAIR_NUMBERS * C; ++j) call.columns[j] = 0.0f;
  parallel_for(C, 256, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin; j < end; ++j) {
      rule.merge_columns(chunks, j, call.columns + j, call.columns + C + j);
      call.columns[4 * C + j] = targets.column_count[j];
    }
  });
}

void softmax_pair_backward(const PairBackward& call, const PairTargets& targets, int threads) {
  if (!targets.plain) return softmax_full_backward(call, targets, threads);
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  Scratch row_side(SoftmaxSide::room(p.rows)), column_side(SoftmaxSide::room(columns)), sums(2 * chunks);
  double* scale_gradients = reinterpret_cast<double*>(sums.data);
  for (int64_t k = 0; k < chunks; ++k) scale_gradients[k] = 0.0;
  Backward rule{targets, SoftmaxSide::make(row_side.data, p.rows, p.rows, call.rows, call.row_gradient),
                SoftmaxSide::make(column_side.data, p.columns, columns, call.columns, call.column_gradient), p.scale,
                scale_gradients};
  sweep_backward(p, rule, true, call.dx, call.dy, threads);
  double total = 0.0;
  for (int64_t k = 0; k < chunks; ++k) total += scale_gradients[k];
  *call.dlog_scale = total;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
