// Divergences of the distributions of a student and a teacher on chunks of logits, in place. Compiled once per level.
#include "core/parallel_for.hpp"
#include "core/vector_math.hpp"
#include "vocabulary/row_vectors.hpp"
#include "vocabulary/vocabulary_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

struct Tops {
  float student, teacher;
};

// Pass 1: what either lacks is taken from both.
Tops align_absent(float* student, float* teacher, int64_t ids) {
  vf a = splat(-infinity), b = splat(-infinity);
  const vf none = splat(-infinity);
  const auto step = [&](int64_t c, int64_t count) {
    const vf s = only_first(load_first(student + c, count), count, -infinity);
    const vf t = only_first(load_first(teacher + c, count), count, -infinity);
    const vi absent = (s == none) | (t == none);
    const vf own = select(absent, none, s), other = select(absent, none, t);
    store_first(student + c, own, count);
    store_first(teacher + c, other, count);
    a = maximum(a, own);
    b = maximum(b, other);
  };
  int64_t c = 0;
  for (; c + W <= ids; c += W) step(c, W);
  if (c < ids) step(c, ids - c);
  return {max_lanes(a), max_lanes(b)};
}

struct Mixture {
  float share, log_share, log_rest;  // m, log m, log(1 - m)
};

// One divergence f(p, q): its term, and its derivative by p. s, t: logarithms of p and q.
template <Divergence Kind>
struct Rule;

// log(exp(a) + exp(b)) of finite a, b
VLM_INLINE vf log_add(vf a, vf b) {
  const vf top = maximum(a, b), low = a + b - top;
  return top + log1p_unit(exp(low - top));
}

template <>
struct Rule<Divergence::forward> {
  static VLM_INLINE_MEMBER vf term(vf, vf q, vf s, vf t, const Mixture&) { return q * (t - s); }
  // p times the derivative: -q, so that p itself may vanish.
  static VLM_INLINE_MEMBER vf push(vf, vf q, vf, vf, const Mixture&) { return -q; }
};
template <>
struct Rule<Divergence::reverse> {
  static VLM_INLINE_MEMBER vf term(vf p, vf, vf s, vf t, const Mixture&) { return p * (s - t); }
  static VLM_INLINE_MEMBER vf push(vf p, vf, vf s, vf t, const Mixture&) { return p * (s - t); }
};
template <>
struct Rule<Divergence::symmetric> {
  static VLM_INLINE_MEMBER vf term(vf p, vf q, vf s, vf t, const Mixture& m) {
    return (m.share * p - (1.0f - m.share) * q) * (s - t);
  }
  static VLM_INLINE_MEMBER vf push(vf p, vf q, vf s, vf t, const Mixture& m) {
    return m.share * p * (s - t) - (1.0f - m.share) * q;
  }
};
template <>
struct Rule<Divergence::js> {
  static VLM_INLINE_MEMBER vf term(vf p, vf q, vf s, vf t, const Mixture& m) {
    const vf middle = log_add(t + m.log_rest, s + m.log_share);
    return (1.0f - m.share) * q * (t - middle) + m.share * p * (s - middle);
  }
  static VLM_INLINE_MEMBER vf push(vf p, vf, vf s, vf t, const Mixture& m) {
    return m.share * p * (s - log_add(t + m.log_rest, s + m.log_share));
  }
};
template <>
struct Rule<Divergence::skew> {
  static VLM_INLINE_MEMBER vf term(vf, vf q, vf s, vf t, const Mixture& m) {
    return q * (t - log_add(t + m.log_share, s + m.log_rest));
  }
  static VLM_INLINE_MEMBER vf push(vf p, vf, vf s, vf t, const Mixture& m) {
    return -(1.0f - m.share) * p * exp(t - log_add(t + m.log_share, s + m.log_rest));
  }
};
template <>
struct Rule<Divergence::tv> {
  static VLM_INLINE_MEMBER vf term(vf p, vf q, vf, vf, const Mixture&) { return 0.5f * maximum(p - q, q - p); }
  static VLM_INLINE_MEMBER vf push(vf p, vf q, vf, vf, const Mixture&) {
    return select(p > q, 0.5f * p, select(p < q, -0.5f * p, vf{}));
  }
};

struct Row {
  float *student, *teacher;
  int64_t ids;
  float inverse;            // 1 / temperature
  Tops tops;
  float own_log, other_log; // log of the sums of exponentials
};

struct Pair {
  vi absent;
  vf p, q, s, t;
};

VLM_INLINE Pair probabilities(const Row& row, int64_t c, int64_t count) {
  Pair out;
  const vf own = only_first(load_first(row.student + c, count), count, -infinity);
  const vf other = load_first(row.teacher + c, count);
  out.absent = own == splat(-infinity);
  // An absent id has probability 0; its logarithm must not make 0 * inf.
  out.s = select(out.absent, vf{}, (own - row.tops.student) * row.inverse - row.own_log);
  out.t = select(out.absent, vf{}, (other - row.tops.teacher) * row.inverse - row.other_log);
  out.p = select(out.absent, vf{}, exp(out.s));
  out.q = select(out.absent, vf{}, exp(out.t));
  return out;
}

struct Sums {
  double value, push;
};

template <Divergence Kind, bool Gradient>
Sums sum_terms(const Row& row, const Mixture& m) {
  double value = 0.0, push = 0.0;
  for (int64_t block = 0; block < row.ids; block += SUM_BLOCK) {
    const int64_t end = smaller(row.ids, block + SUM_BLOCK);
    vf terms{}, pushes{};
    const auto step = [&](int64_t c, int64_t count) {
      const Pair at = probabilities(row, c, count);
      terms += select(at.absent, vf{}, Rule<Kind>::term(at.p, at.q, at.s, at.t, m));
      if constexpr (Gradient) pushes += select(at.absent, vf{}, Rule<Kind>::push(at.p, at.q, at.s, at.t, m));
    };
    int64_t c = block;
    for (; c + W <= end; c += W) step(c, W);
    if (c < end) step(c, end - c);
    value += sum_lanes(terms);
    if constexpr (Gradient) push += sum_lanes(pushes);
  }
  return {value, push};
}

template <Divergence Kind>
void make_gradient(const Row& row, const Mixture& m, float push, float factor) {
  const auto step = [&](int64_t c, int64_t count) {
    const Pair at = probabilities(row, c, count);
    const vf g = (Rule<Kind>::push(at.p, at.q, at.s, at.t, m) - at.p * push) * factor;
    store_first(row.student + c, select(at.absent, vf{}, g), count);
  };
  int64_t c = 0;
  for (; c + W <= row.ids; c += W) step(c, W);
  if (c < row.ids) step(c, row.ids - c);
}

template <Divergence Kind>
float one_row(const Row& row, const Mixture& m, bool gradient, float factor) {
  if (!gradient) return static_cast<float>(sum_terms<Kind, false>(row, m).value);
  const Sums sums = sum_terms<Kind, true>(row, m);
  make_gradient<Kind>(row, m, static_cast<float>(sums.push), factor * row.inverse);
  return static_cast<float>(sums.value);
}

float one_row(Divergence kind, const Row& row, const Mixture& m, bool gradient, float factor) {
  switch (kind) {
    case Divergence::forward: return one_row<Divergence::forward>(row, m, gradient, factor);
    case Divergence::reverse: return one_row<Divergence::reverse>(row, m, gradient, factor);
    case Divergence::symmetric: return one_row<Divergence::symmetric>(row, m, gradient, factor);
    case Divergence::js: return one_row<Divergence::js>(row, m, gradient, factor);
    case Divergence::skew: return one_row<Divergence::skew>(row, m, gradient, factor);
    default: return one_row<Divergence::tv>(row, m, gradient, factor);
  }
}

}  // namespace

void divergence_rows(const DivergenceRows& call, int threads) {
  const Mixture mixture{call.mix, __builtin_logf(call.mix), __builtin_logf(1.0f - call.mix)};
  parallel_for(call.rows, 2, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* student = call.student.data + i * call.student.row_stride;
      float* teacher = call.teacher.data + i * call.teacher.row_stride;
      Row row{student, teacher, call.ids, 1.0f / call.temperature, align_absent(student, teacher, call.ids), 0.0f,
              0.0f};
      if (row.tops.student == -infinity && any_nan(student, call.ids)) row.tops.student = not_a_number;
      if (row.tops.student == -infinity) {  // no id in common
        call.value[i] = 0.0f;
        if (call.gradient) fill(student, call.ids, 0.0f);
        continue;
      }
      row.own_log =
          static_cast<float>(__builtin_log(exponentials<false>(student, call.ids, row.tops.student, row.inverse)));
      row.other_log =
          static_cast<float>(__builtin_log(exponentials<false>(teacher, call.ids, row.tops.teacher, row.inverse)));
      call.value[i] = one_row(call.kind, row, mixture, call.gradient, call.factors == nullptr ? 1.0f : call.factors[i]);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
