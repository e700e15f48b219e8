// Sigmoid contrastive loss (SigLIP). Compiled once per level.
#include "contrastive/pair_kernels.hpp"
#include "contrastive/pair_sweep.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

VLM_INLINE vi lanes_below(int64_t count) { return lane_numbers() < splat_int(static_cast<int32_t>(count)); }
VLM_INLINE vf magnitude(vf x) { return maximum(x, -x); }

struct Forward {
  const PairTargets& targets;
  float bias;
  double* rows;
  double* column_parts;  // [chunk][columns]
  int64_t columns;       // padded

  void forward_tile(const LogitTile& t) {
    double* state = column_parts + t.chunk * columns + t.column;
    for (int64_t r = 0; r < t.height; ++r) {
      float* z = t.data + r * LDS;
      const vi id = splat_int(targets.row_ids[t.row + r]);
      vf sum{};
      for (int64_t c = 0; c < t.breadth; c += W) {
        const vf logit = load(z + c) + bias;
        const vf wrong = select(load(targets.column_ids + t.column + c) == id, -logit, logit);  // -t z
        const vf term = maximum(wrong, vf{}) + log1p_unit(exp(-magnitude(wrong)));
        const vf kept = select(lanes_below(t.breadth - c), term, vf{});
        sum += kept;
        store(z + c, kept);
      }
      rows[t.row + r] += sum_lanes(sum);
    }
    for (int64_t c = 0; c < t.breadth; c += W) {
      vf sum{};
      for (int64_t r = 0; r < t.height; ++r) sum += load(t.data + r * LDS + c);
      for (int l = 0; l < W; ++l) state[c + l] += sum[l];
    }
  }
};

struct Backward {
  const PairTargets& targets;
  const float* row_gradient;
  const float* column_gradient;  // padded with zeros
  float scale, bias;
  double* sums;  // for each chunk: gradients of log(scale) and of bias

  void gradient_tile(const LogitTile& t) {
    double scale_total = 0.0, bias_total = 0.0;
    for (int64_t r = 0; r < t.height; ++r) {
      float* z = t.data + r * LDS;
      const vf row = splat(row_gradient[t.row + r]);
      const vi id = splat_int(targets.row_ids[t.row + r]);
      vf scale_sum{}, bias_sum{};
      for (int64_t c = 0; c < t.breadth; c += W) {
        const int64_t at = t.column + c;
        const vf product = load(z + c);  // 0 beyond the last column
        const vf logit = product + bias;
        const vi positive = load(targets.column_ids + at) == id;
        const vf wrong = select(positive, -logit, logit);
        const vf e = exp(-magnitude(wrong));
        const vf probability = select(wrong >= vf{}, splat(1.0f), e) / (e + 1.0f);  // sigmoid(-t z), no cancellation
        const vf signed_probability = select(positive, -probability, probability);
        const vf weight = select(lanes_below(t.breadth - c), row + load(column_gradient + at), vf{});
        const vf g = weight * signed_probability;
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

}  // namespace

void sigmoid_pair_forward(const PairForward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  Scratch state(2 * (p.rows + chunks * columns));
  double* rows = reinterpret_cast<double*>(state.data);
  for (int64_t i = 0; i < p.rows + chunks * columns; ++i) rows[i] = 0.0;
  Forward rule{targets, p.bias, rows, rows + p.rows, columns};
  sweep_forward(p, rule, threads);
  for (int64_t i = 0; i < p.rows; ++i) call.row_values[i] = static_cast<float>(rows[i]);
  for (int64_t j = 0; j < p.columns; ++j) {
    double sum = 0.0;
    for (int64_t k = 0; k < chunks; ++k) sum += rule.column_parts[k * columns + j];
    call.column_values[j] = static_cast<float>(sum);
  }
}

void sigmoid_pair_backward(const PairBackward& call, const PairTargets& targets, int threads) {
  const PairProblem& p = call.problem;
  const int64_t chunks = cut_rows(p.rows).count, columns = round_up(p.columns, W);
  Scratch padded(columns), totals(4 * chunks);
  for (int64_t j = 0; j < columns; ++j) padded.data[j] = j < p.columns ? call.column_gradient[j] : 0.0f;
  double* sums = reinterpret_cast<double*>(totals.data);
  for (int64_t k = 0; k < 2 * chunks; ++k) sums[k] = 0.0;
  Backward rule{targets, call.row_gradient, padded.data, p.scale, p.bias, sums};
  sweep_backward(p, rule, call.dx, call.dy, threads);
  double scale_total = 0.0, bias_total = 0.0;
  for (int64_t k = 0; k < chunks; ++k) {
    scale_total += sums[2 * k];
    bias_total += sums[2 * k + 1];
  }
  *call.dlog_scale = scale_total;
  if (call.dbias != nullptr) *call.dbias = bias_total;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
