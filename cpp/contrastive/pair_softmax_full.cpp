// Softmax contrastive statistics with everything that plain targets lack: exclusions, denominators without positives,
// sums over all pairs, a teacher. Compiled once per level.
#include "contrastive/pair_softmax.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// What is summed while tiles go by, for many rows or columns.
struct Sums {
  float *maximum, *sum, *positive, *total, *kept, *teacher_maximum, *teacher_sum, *teacher;

  static int64_t room(int64_t n) { return 8 * n; }
  static Sums at(float* d, int64_t n) {
    return {d, d + n, d + 2 * n, d + 3 * n, d + 4 * n, d + 5 * n, d + 6 * n, d + 7 * n};
  }
  void clear(int64_t n) {
    for (int64_t i = 0; i < room(n); ++i) maximum[i] = 0.0f;
    for (int64_t i = 0; i < n; ++i) maximum[i] = teacher_maximum[i] = -infinity;
  }
};

VLM_INLINE vf finite_or_zero(vf maximum) { return select(maximum == splat(-infinity), vf{}, maximum); }

struct Forward {
  PairMasks masks;
  Sums rows;
  float* column_parts;  // Sums for each chunk, null if not wanted
  int64_t columns;      // padded

  Sums columns_of(int64_t chunk) const { return Sums::at(column_parts + chunk * Sums::room(columns), columns); }

  void forward_tile(const LogitTile& t) {
    for (int64_t r = 0; r < t.height; ++r) row(t, r);
    if (column_parts == nullptr) return;
    const Sums state = columns_of(t.chunk);
    for (int64_t c = 0; c < t.breadth; c += W) column(t, c, state);
  }

  // Adds row r of the tile; leaves the logits of kept pairs (0 elsewhere) in the tile, those of the denominator (-inf
  // elsewhere) in `spare`, the teacher's of kept pairs (-inf elsewhere) in `teacher`.
  void row(const LogitTile& t, int64_t r) {
    float *z = t.data + r * LDS, *d = t.spare + r * LDS, *u = t.teacher == nullptr ? nullptr : t.teacher + r * LDS;
    const vf nothing = splat(-infinity);
    vf top = nothing, teacher_top = nothing, positive{}, total{}, kept{};
    for (int64_t c = 0; c < t.breadth; c += W) {
      vf taught;
      const PairMask mask = masks.at(t, r, c, &taught);
      const vf value = select(mask.kept, load(z + c), vf{}), part = select(mask.denominator, value, nothing);
      top = maximum(part, top);
      positive += select(mask.positive, value, vf{});
      total += value;
      kept += select(mask.kept, splat(1.0f), vf{});
      store(z + c, value);
      store(d + c, part);
      if (u == nullptr) continue;
      taught = select(mask.kept, taught, nothing);
      teacher_top = maximum(taught, teacher_top);
      store(u + c, taught);
    }
    const int64_t i = t.row + r;
    const float now = __builtin_fmaxf(max_lanes(top), rows.maximum[i]), reference = now == -infinity ? 0.0f : now;
    vf sum{};
    for (int64_t c = 0; c < t.breadth; c += W) sum += exp(load(d + c) - reference);
    rows.sum[i] = rows.sum[i] * __builtin_expf(rows.maximum[i] - reference) + sum_lanes(sum);
    rows.maximum[i] = now;
    rows.positive[i] += sum_lanes(positive);
    rows.total[i] += sum_lanes(total);
    rows.kept[i] += sum_lanes(kept);
    if (u == nullptr) return;
    const float teacher_now = __builtin_fmaxf(max_lanes(teacher_top), rows.teacher_maximum[i]);
    const float teacher_reference = teacher_now == -infinity ? 0.0f : teacher_now;
    vf weight{}, product{};
    for (int64_t c = 0; c < t.breadth; c += W) {
      const vf share = exp(load(u + c) - teacher_reference);
      weight += share;
      product += share * load(z + c);
    }
    const float before = __builtin_expf(rows.teacher_maximum[i] - teacher_reference);
    rows.teacher_sum[i] = rows.teacher_sum[i] * before + sum_lanes(weight);
    rows.teacher[i] = rows.teacher[i] * before + sum_lanes(product);
    rows.teacher_maximum[i] = teacher_now;
  }

  void column(const LogitTile& t, int64_t c, const Sums& state) {
    const int64_t at = t.column + c;
    const vi ids = load(masks.targets.column_ids + at);
    const vf nothing = splat(-infinity), before = load(state.maximum + at);
    vf now = before;
    for (int64_t r = 0; r < t.height; ++r) now = maximum(load(t.spare + r * LDS + c), now);
    const vf reference = finite_or_zero(now);
    vf sum = load(state.sum + at) * exp(before - reference), positive = load(state.positive + at);
    vf total = load(state.total + at), kept = load(state.kept + at);
    for (int64_t r = 0; r < t.height; ++r) {
      const vf value = load(t.data + r * LDS + c), part = load(t.spare + r * LDS + c);
      const vi is_positive = ids == splat_int(masks.targets.row_ids[t.row + r]);
      sum += exp(part - reference);
      positive += select(is_positive, value, vf{});
      total += value;
      kept += select((part > nothing) | is_positive, splat(1.0f), vf{});
    }
    store(state.maximum + at, now);
    store(state.sum + at, sum);
    store(state.positive + at, positive);
    store(state.total + at, total);
    store(state.kept + at, kept);
    if (t.teacher == nullptr) return;
    const vf teacher_before = load(state.teacher_maximum + at);
    vf teacher_now = teacher_before;
    for (int64_t r = 0; r < t.height; ++r) teacher_now = maximum(load(t.teacher + r * LDS + c), teacher_now);
    const vf teacher_reference = finite_or_zero(teacher_now), old = exp(teacher_before - teacher_reference);
    vf weight = load(state.teacher_sum + at) * old, product = load(state.teacher + at) * old;
    for (int64_t r = 0; r < t.height; ++r) {
      const vf share = exp(load(t.teacher + r * LDS + c) - teacher_reference);
      weight += share;
      product += share * load(t.data + r * LDS + c);
    }
    store(state.teacher_maximum + at, teacher_now);
    store(state.teacher_sum + at, weight);
    store(state.teacher + at, product);
  }
};

// The seven numbers of entry i, from the sums of `parts` parts.
template <class PartOf>
void finish(int64_t parts, int64_t i, int64_t n, float count, bool taught, PartOf part_of, float* to) {
  float top = -infinity, teacher_top = -infinity;
  for (int64_t k = 0; k < parts; ++k) {
    top = __builtin_fmaxf(top, part_of(k).maximum[i]);
    teacher_top = __builtin_fmaxf(teacher_top, part_of(k).teacher_maximum[i]);
  }
  float sum = 0.0f, positive = 0.0f, total = 0.0f, kept = 0.0f, weight = 0.0f, product = 0.0f;
  for (int64_t k = 0; k < parts; ++k) {
    const Sums part = part_of(k);
    if (part.sum[i] != 0.0f) sum += part.sum[i] * __builtin_expf(part.maximum[i] - top);  // NaN is a sum, too
    positive += part.positive[i];
    total += part.total[i];
    kept += part.kept[i];
    if (part.teacher_maximum[i] == -infinity) continue;
    const float factor = __builtin_expf(part.teacher_maximum[i] - teacher_top);
    weight += part.teacher_sum[i] * factor;
    product += part.teacher[i] * factor;
  }
  to[i] = sum == 0.0f ? -infinity : top + __builtin_logf(sum);
  to[n + i] = positive;
  to[2 * n + i] = total;
  to[3 * n + i] = weight > 0.0f ? product / weight : 0.0f;
  to[4 * n + i] = count;
  to[5 * n + i] = kept;
  to[6 * n + i] = !taught ? 0.0f : teacher_top == -infinity ? teacher_top : teacher_top + __builtin_logf(weight);
}

struct Backward {
  PairMasks masks;
  SoftmaxSide rows, columns;
  float scale;
  double* scale_gradients;  // for each chunk

  void gradient_tile(const LogitTile& t) {
    double sum = 0.0;
    for (int64_t r = 0; r < t.height; ++r) sum += gradient_row(t, r);
    scale_gradients[t.chunk] += sum;
  }

  float gradient_row(const LogitTile& t, int64_t r) {
    float* z = t.data + r * LDS;
    const int64_t i = t.row + r;
    const vf lse = splat(rows.lse[i]), weight = splat(rows.weight[i]), positive = splat(rows.positive[i]);
    const vf total = splat(rows.total[i]), teacher = splat(rows.teacher[i]), teacher_lse = splat(rows.teacher_lse[i]);
    vf sum{};
    for (int64_t c = 0; c < t.breadth; c += W) {
      const int64_t at = t.column + c;
      vf u;
      const PairMask mask = masks.at(t, r, c, &u);
      const vf value = load(z + c);
      vf g = weight * exp(value - lse) + load(columns.weight + at) * exp(value - load(columns.lse + at));
      g = select(mask.denominator, g, vf{});  // outside, exp may be anything
      g += select(mask.positive, positive + load(columns.positive + at), vf{});
      vf all = total + load(columns.total + at);
      if (t.teacher != nullptr)
        all += teacher * exp(u - teacher_lse) + load(columns.teacher + at) * exp(u - load(columns.teacher_lse + at));
      g += select(mask.kept, all, vf{});
      sum += select(mask.kept, g * value, vf{});
      store(z + c, g * scale);
    }
    return sum_lanes(sum);
  }
};

}  // namespace

void softmax_full_forward(const PairForward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t R = p.rows, C = p.columns, chunks = cut_rows(R).count, columns = round_up(C, W);
  const bool want_columns = call.columns != nullptr, taught = p.teacher.x.data != nullptr;
  Scratch row_state(Sums::room(R)), column_state(want_columns ? chunks * Sums::room(columns) : 0);
  Forward rule{PairMasks(targets, p), Sums::at(row_state.data, R), want_columns ? column_state.data : nullptr, columns};
  rule.rows.clear(R);
  for (int64_t k = 0; want_columns && k < chunks; ++k) rule.columns_of(k).clear(columns);
  sweep_forward(p, rule, false, threads);
  for (int64_t i = 0; i < R; ++i)
    finish(1, i, R, targets.row_count[i], taught, [&](int64_t) { return rule.rows; }, call.rows);
  if (!want_columns) return;
  parallel_for(C, 256, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin; j < end; ++j)
      finish(chunks, j, C, targets.column_count[j], taught, [&](int64_t k) { return rule.columns_of(k); },
             call.columns);
  });
}

void softmax_full_backward(const PairBackward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  Scratch row_side(SoftmaxSide::room(p.rows)), column_side(SoftmaxSide::room(columns)), sums(2 * chunks);
  double* scale_gradients = reinterpret_cast<double*>(sums.data);
  for (int64_t k = 0; k < chunks; ++k) scale_gradients[k] = 0.0;
  Backward rule{PairMasks(targets, p), SoftmaxSide::make(row_side.data, p.rows, p.rows, call.rows, call.row_gradient),
                SoftmaxSide::make(column_side.data, p.columns, columns, call.columns, call.column_gradient), p.scale,
                scale_gradients};
  sweep_backward(p, rule, false, call.dx, call.dy, threads);
  double total = 0.0;
  for (int64_t k = 0; k < chunks; ++k) total += scale_gradients[k];
  *call.dlog_scale = total;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
