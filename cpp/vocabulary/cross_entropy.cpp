// Cross-entropy over the vocabulary on a chunk of logits, in place. Compiled once per level.
#include "core/parallel_for.hpp"
#include "core/vector_math.hpp"
#include "vocabulary/row_vectors.hpp"
#include "vocabulary/vocabulary_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

struct RowTop {
  float top;   // the greatest logit
  double sum;  // of all logits, only where smoothing asks for it
};

// Pass 1: the logits take the place of the products where a bias or a cap changes them.
template <bool Bias, bool Cap, bool Sum>
RowTop make_logits(float* row, int64_t ids, const float* bias, float cap) {
  vf top = splat(-infinity);
  double sum = 0.0;
  const float inverse = Cap ? 1.0f / cap : 0.0f;
  const auto make = [&](vf z, int64_t c, int64_t count) {
    if constexpr (Bias) z += load_first(bias + c, count);
    if constexpr (Cap) z = cap * tanh(z * inverse);
    return z;
  };
  for (int64_t block = 0; block < ids; block += SUM_BLOCK) {
    const int64_t end = smaller(ids, block + SUM_BLOCK);
    vf part{};
    int64_t c = block;
    for (; c + W <= end; c += W) {
      const vf z = make(load(row + c), c, W);
      if constexpr (Bias || Cap) store(row + c, z);
      top = maximum(top, z);
      if constexpr (Sum) part += z;
    }
    if (c < end) {
      const int64_t left = end - c;
      const vf z = make(load_first(row + c, left), c, left);
      if constexpr (Bias || Cap) store_first(row + c, z, left);
      top = maximum(top, only_first(z, left, -infinity));
      if constexpr (Sum) part += only_first(z, left, 0.0f);
    }
    if constexpr (Sum) sum += sum_lanes(part);
  }
  return {max_lanes(top), sum};
}

template <bool Bias, bool Cap>
RowTop make_logits(float* row, const CrossEntropyRows& call) {
  return call.smoothing > 0.0f ? make_logits<Bias, Cap, true>(row, call.ids, call.bias, call.softcap)
                               : make_logits<Bias, Cap, false>(row, call.ids, call.bias, call.softcap);
}

RowTop make_logits(float* row, const CrossEntropyRows& call) {
  const bool cap = call.softcap > 0.0f;
  if (call.bias != nullptr) return cap ? make_logits<true, true>(row, call) : make_logits<true, false>(row, call);
  return cap ? make_logits<false, true>(row, call) : make_logits<false, false>(row, call);
}

// Pass 3 without a cap: the exponentials of pass 2 are at hand.
void scale_exponentials(float* row, int64_t ids, float scale, float shift) {
  int64_t c = 0;
  for (; c + W <= ids; c += W) store(row + c, load(row + c) * scale - shift);
  for (; c < ids; ++c) row[c] = row[c] * scale - shift;
}

// Pass 3 with a cap c: the row still holds logits z, and dz/dt = 1 - (z / c)^2.
void capped_gradient(float* row, int64_t ids, float lse, float scale, float shift, float cap, int64_t label,
                     float pull) {
  const float inverse = 1.0f / cap;
  const float at_label = label >= 0 ? row[label] * inverse : 0.0f;
  const float own = label >= 0 ? pull * (1.0f - at_label * at_label) : 0.0f;
  const auto gradient = [&](vf z) {
    const vf share = z * inverse;
    return (exp(z - lse) * scale - shift) * (1.0f - share * share);
  };
  int64_t c = 0;
  for (; c + W <= ids; c += W) store(row + c, gradient(load(row + c)));
  if (c < ids) store_first(row + c, gradient(load_first(row + c, ids - c)), ids - c);
  if (label >= 0) row[label] -= own;
}

void one_row(const CrossEntropyRows& call, int64_t i) {
  float* row = call.chunk.data + i * call.chunk.row_stride;
  const int64_t ids = call.ids, label = call.labels[i];
  const float smoothing = label >= 0 ? call.smoothing : 0.0f;
  const bool capped = call.softcap > 0.0f;
  RowTop at = make_logits(row, call);
  if (at.top == -infinity && any_nan(row, ids)) at.top = not_a_number;
  const float own = label >= 0 ? row[label] : 0.0f;
  if (at.top == -infinity) {  // nothing can be chosen
    call.lse[i] = -infinity;
    call.log_p[i] = label >= 0 ? -infinity : 0.0f;
    call.loss[i] = infinity;
    if (call.gradient) fill(row, ids, 0.0f);
    return;
  }
  const double sum = call.gradient && !capped ? exponentials<true>(row, ids, at.top, 1.0f)
                                              : exponentials<false>(row, ids, at.top, 1.0f);
  const double log_sum = __builtin_log(sum), lse = at.top + log_sum;
  double loss = label >= 0 ? log_sum + (double(at.top) - own) : lse;
  call.log_p[i] = label >= 0 ? static_cast<float>(-loss) : 0.0f;
  if (smoothing > 0.0f && own != -infinity) loss += smoothing * (own - at.sum / ids);  // else it is inf
  loss += call.z_loss * lse * lse;
  call.loss[i] = static_cast<float>(loss);
  call.lse[i] = static_cast<float>(lse);
  if (!call.gradient) return;
  const float factor = call.factors == nullptr ? 1.0f : call.factors[i];
  const double push = factor * (1.0 + 2.0 * call.z_loss * lse);
  const float shift = factor * smoothing / static_cast<float>(ids), pull = factor * (1.0f - smoothing);
  if (capped) {
    capped_gradient(row, ids, static_cast<float>(lse), static_cast<float>(push), shift, call.softcap, label, pull);
  } else {
    scale_exponentials(row, ids, static_cast<float>(push / sum), shift);
    if (label >= 0) row[label] -= pull;
  }
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& call, int threads) {
  parallel_for(call.rows, 4, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) one_row(call, i);
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
