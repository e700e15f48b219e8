// Sigmoid contrastive loss (SigLIP). Compiled once per level.
#include "contrastive/pair_kernels.hpp"
#include "contrastive/pair_masks.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

VLM_INLINE vf magnitude(vf x) { return maximum(x, -x); }

// Labels and weights of pairs. Plain: 1 on positives, 0 elsewhere, weight 1.
template <bool Plain>
struct Labels {
  PairMasks masks;
  float share, negative_weight;

  Labels(const PairTargets& targets, const PairProblem& p)
      : masks(targets, p), share(p.teacher.x.data == nullptr ? 0.0f : p.teacher.share),
        negative_weight(p.negative_weight) {}

  // The label of each lane, and its weight, 0 for pairs that are not kept.
  VLM_INLINE_MEMBER vf at(const LogitTile& t, int64_t r, int64_t c, vf* weight) const {
    const PairTargets& targets = masks.targets;
    if constexpr (Plain) {
      const vi positive = load(targets.column_ids + t.column + c) == splat_int(targets.row_ids[t.row + r]);
      *weight = select(lanes_below(t.breadth - c), splat(1.0f), vf{});
      return select(positive, splat(1.0f), vf{});
    } else {
      vf u;
      const PairMask mask = masks.at(t, r, c, &u);
      *weight = select(mask.kept, select(mask.positive, splat(1.0f), splat(negative_weight)), vf{});
      const vf hard = select(mask.positive, splat(targets.positive_label[t.row + r]),
                             splat(targets.negative_label[t.row + r]));
      if (share == 0.0f) return hard;
      const vf e = exp(-magnitude(u));
      return hard * (1.0f - share) + select(u >= vf{}, splat(1.0f), e) / (e + 1.0f) * share;
    }
  }
};

template <bool Plain>
struct Forward {
  Labels<Plain> labels;
  float bias;
  double* rows;
  double* column_parts;  // [chunk][columns], null if not wanted
  int64_t columns;       // padded

  void forward_tile(const LogitTile& t) {
    for (int64_t r = 0; r < t.height; ++r) {
      float* z = t.data + r * LDS;
      vf sum{};
      for (int64_t c = 0; c < t.breadth; c += W) {
        const vf logit = load(z + c) + bias;
        vf weight;
        const vf label = labels.at(t, r, c, &weight);
        const vf term = maximum(logit, vf{}) - label * logit + log1p_unit(exp(-magnitude(logit)));
        const vf kept = select(weight > vf{}, term * weight, vf{});
        sum += kept;
        store(z + c, kept);
      }
      rows[t.row + r] += sum_lanes(sum);
    }
    if (column_parts == nullptr) return;
    double* state = column_parts + t.chunk * columns + t.column;
    for (int64_t c = 0; c < t.breadth; c += W) {
      vf sum{};
      for (int64_t r = 0; r < t.height; ++r) sum += load(t.data + r * LDS + c);
      for (int l = 0; l < W; ++l) state[c + l] += sum[l];
    }
  }
};

template <bool Plain>
struct Backward {
  Labels<Plain> labels;
  const float* row_gradient;
  const float* column_gradient;  // padded with zeros
  float scale, bias;
  double* sums;  // for each chunk: gradients of log(scale) and of bias

  void gradient_tile(const LogitTile& t) {
    double scale_total = 0.0, bias_total = 0.0;
    for (int64_t r = 0; r < t.height; ++r) {
      float* z = t.data + r * LDS;
      const vf row = splat(row_gradient[t.row + r]);
      vf scale_sum{}, bias_sum{};
      for (int64_t c = 0; c < t.breadth; c += W) {
        const vf product = load(z + c);  // 0 beyond the last column
        const vf logit = product + bias;
        vf weight;
        const vf label = labels.at(t, r, c, &weight);
        const vf e = exp(-magnitude(logit)), low = e / (e + 1.0f), high = splat(1.0f) / (e + 1.0f);
        const vi above = logit >= vf{};
        // sigmoid(z) - p without cancellation where p is 0 or 1.
        const vf slope = (1.0f - label) * select(above, high, low) - label * select(above, low, high);
        const vf upstream = (row + load(column_gradient + t.column + c)) * weight;
        const vf g = select(weight > vf{}, upstream * slope, vf{});
        scale_sum += g * product;
        bias_sum += g;
        store(z + c, g * scale);
      }
      scale_total += sum_lanes(scale_sum);
      bias_total += sum_lanes(bias_sum);
    }
    sums[2 * t.chunk] += scale_total;
    sums[2 * t.chunk + 1] += bias_total;
  }
};

template <bool Plain>
void forward(const PairForward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  const int64_t parts = call.columns == nullptr ? 0 : chunks * columns;
  Scratch state(2 * (p.rows + parts));
  double* rows = reinterpret_cast<double*>(state.data);
  for (int64_t i = 0; i < p.rows + parts; ++i) rows[i] = 0.0;
  Forward<Plain> rule{Labels<Plain>(targets, p), p.bias, rows, parts == 0 ? nullptr : rows + p.rows, columns};
  sweep_forward(p, rule, Plain, threads);
  for (int64_t i = 0; i < p.rows; ++i) call.rows[i] = static_cast<float>(rows[i]);
  if (call.columns == nullptr) return;
  for (int64_t j = 0; j < p.columns; ++j) {
    double sum = 0.0;
    for (int64_t k = 0; k < chunks; ++k) sum += rule.column_parts[k * columns + j];
    call.columns[j] = static_cast<float>(sum);
  }
}

template <bool Plain>
void backward(const PairBackward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  Scratch padded(columns), totals(4 * chunks);
  for (int64_t j = 0; j < columns; ++j)
    padded.data[j] = j < p.columns && call.column_gradient != nullptr ? call.column_gradient[j] : 0.0f;
  double* sums = reinterpret_cast<double*>(totals.data);
  for (int64_t k = 0; k < 2 * chunks; ++k) sums[k] = 0.0;
  Backward<Plain> rule{Labels<Plain>(targets, p), call.row_gradient, padded.data, p.scale, p.bias, sums};
  sweep_backward(p, rule, Plain, call.dx, call.dy, threads);
  double scale_total = 0.0, bias_total = 0.0;
  for (int64_t k = 0; k < chunks; ++k) {
    scale_total += sums[2 * k];
    bias_total += sums[2 * k + 1];
  }
  *call.dlog_scale = scale_total;
  if (call.dbias != nullptr) *call.dbias = bias_total;
}

}  // namespace

void sigmoid_pair_forward(const PairForward& call, const PairTargets& targets, int threads) {
  targets.plain ? forward<true>(call, targets, threads) : forward<false>(call, targets, threads);
}

void sigmoid_pair_backward(const PairBackward& call, const PairTargets& targets, int threads) {
  targets.plain ? backward<true>(call, targets, threads) : backward<false>(call, targets, threads);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
