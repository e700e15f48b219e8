// Alignment of W pairs at once, one in each lane, by anti-diagonals. Compiled once per level.
#include "alignment/alignment_kernels.hpp"
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// W pairs: their greatest lengths, and lane by lane where they are. An absent pair has length 0.
struct Group {
  const AlignmentProblem* problem;
  int64_t first, count, rows, columns;
  int32_t row_length[W], column_length[W];
};

Group group_of(const AlignmentProblem& p, int64_t index) {
  Group g{&p, index * W, smaller(W, p.batch - index * W), 0, 0, {}, {}};
  for (int64_t l = 0; l < g.count; ++l) {
    const int64_t n = p.row_lengths == nullptr ? p.rows : p.row_lengths[g.first + l];
    const int64_t m = p.column_lengths == nullptr ? p.columns : p.column_lengths[g.first + l];
    g.row_length[l] = static_cast<int32_t>(n);
    g.column_length[l] = static_cast<int32_t>(m);
    if (n == 0 || m == 0) continue;
    g.rows = larger(g.rows, n);
    g.columns = larger(g.columns, m);
  }
  return g;
}

// Tables of vectors: costs [rows, columns], sums and gradients [rows + 1, columns + 1].
struct Tables {
  float *cost, *sum, *gradient;

  static int64_t room(const AlignmentProblem& p, bool backward) {
    return W * (p.rows * p.columns + (backward ? 2 : 1) * (p.rows + 1) * (p.columns + 1));
  }
  static Tables at(float* data, const AlignmentProblem& p) {
    const int64_t costs = W * p.rows * p.columns;
    return {data, data + costs, data + costs + W * (p.rows + 1) * (p.columns + 1)};
  }
};

// cost[i, j, lane] <- c of the lane's pair
void pack(const Group& g, float* cost) {
  const AlignmentProblem& p = *g.problem;
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t j = 0; j < g.columns; j += W) {
      const int64_t left = smaller(W, g.columns - j);
      vf block[W];
      for (int l = 0; l < W; ++l) {
        const bool there = l < g.count && i < g.row_length[l];
        block[l] = there ? load_first(p.cost + (g.first + l) * p.batch_stride + i * p.row_stride + j, left) : vf{};
      }
      transpose(block);
      for (int64_t k = 0; k < left; ++k) store(cost + ((i * g.columns) + j + k) * W, block[k]);
    }
}

struct Softness {
  float gamma, inverse;
};

// NaN if any of them is.
VLM_INLINE vf least(vf a, vf b, vf c) {
  const vf ab = select((a < b) | (a != a), a, b);
  return select((ab < c) | (ab != ab), ab, c);
}

// log(s) for s in [1, 3]
VLM_INLINE vf log_of_sum(vf s) {
  const vi over = s > 2.0f;
  return select(over, splat(ln_2), vf{}) + log1p_unit(select(over, 0.5f * s, s) - 1.0f);
}

template <bool Hard>
VLM_INLINE vf soft_minimum(vf diagonal, vf up, vf left, const Softness& soft) {
  const vf low = least(diagonal, up, left);
  if constexpr (Hard) return low;
  const vf sum =
      exp((low - diagonal) * soft.inverse) + exp((low - up) * soft.inverse) + exp((low - left) * soft.inverse);
  return select(low == splat(infinity), low, low - soft.gamma * log_of_sum(sum));
}

template <bool Hard>
void fill_sums(const Group& g, const Tables& t, const Softness& soft) {
  const int64_t stride = (g.columns + 1) * W;
  for (int64_t i = 0; i <= g.rows; ++i) store(t.sum + i * stride, splat(infinity));
  for (int64_t j = 1; j <= g.columns; ++j) store(t.sum + j * W, splat(infinity));
  store(t.sum, vf{});
  // Cells of one anti-diagonal do not wait for each other.
  for (int64_t d = 2; d <= g.rows + g.columns; ++d) {
    const int64_t end = smaller(g.rows, d - 1);
    for (int64_t i = larger(1, d - g.columns); i <= end; ++i) {
      const int64_t j = d - i;
      float* at = t.sum + i * stride + j * W;
      const vf low = soft_minimum<Hard>(load(at - stride - W), load(at - stride), load(at - W), soft);
      store(at, load(t.cost + ((i - 1) * g.columns + j - 1) * W) + low);
    }
  }
}

void fill_sums(const Group& g, const Tables& t, float gamma) {
  pack(g, t.cost);
  if (gamma == 0.0f)
    fill_sums<true>(g, t, {0.0f, 0.0f});
  else
    fill_sums<false>(g, t, {gamma, 1.0f / gamma});
}

float value_of(const Group& g, const Tables& t, int64_t lane) {
  const int64_t n = g.row_length[lane], m = g.column_length[lane];
  if (n == 0 || m == 0) return n == m ? 0.0f : infinity;
  return t.sum[(n * (g.columns + 1) + m) * W + lane];
}

// Each cell hands its gradient on to the three cells before it, by their shares in the minimum.
template <bool Hard>
void hand_back(const Group& g, const Tables& t, const Softness& soft) {
  const int64_t stride = (g.columns + 1) * W;
  for (int64_t d = g.rows + g.columns; d >= 2; --d) {
    const int64_t end = smaller(g.rows, d - 1);
    for (int64_t i = larger(1, d - g.columns); i <= end; ++i) {
      const int64_t at = i * stride + (d - i) * W;
      const vf own = load(t.gradient + at);
      const vf diagonal = load(t.sum + at - stride - W), up = load(t.sum + at - stride), left = load(t.sum + at - W);
      const vf low = least(diagonal, up, left);
      vf to_diagonal, to_up, to_left;
      // A lane beyond its lengths has gradient 0 and sums that mean nothing.
      const vi idle = (own == vf{}) | (low == splat(infinity));
      if constexpr (Hard) {
        const vi first = diagonal == low, second = ~first & (up == low);
        to_diagonal = select(first, own, vf{});
        to_up = select(second, own, vf{});
        to_left = select(first | second, vf{}, own);
      } else {
        to_diagonal = exp((low - diagonal) * soft.inverse);
        to_up = exp((low - up) * soft.inverse);
        to_left = exp((low - left) * soft.inverse);
        const vf share = own / (to_diagonal + to_up + to_left);
        to_diagonal *= share;
        to_up *= share;
        to_left *= share;
      }
      float* to = t.gradient + at;
      store(to - stride - W, load(to - stride - W) + select(idle, vf{}, to_diagonal));
      store(to - stride, load(to - stride) + select(idle, vf{}, to_up));
      store(to - W, load(to - W) + select(idle, vf{}, to_left));
    }
  }
}

void unpack(const Group& g, const float* gradient, float* out) {
  const AlignmentProblem& p = *g.problem;
  for (int64_t l = 0; l < g.count; ++l) {
    float* to = out + (g.first + l) * p.rows * p.columns;
    for (int64_t k = 0; k < p.rows * p.columns; ++k) to[k] = 0.0f;
    for (int64_t i = 0; i < g.row_length[l]; ++i)
      for (int64_t j = 0; j < g.column_length[l]; ++j)
        to[i * p.columns + j] = gradient[((i + 1) * (g.columns + 1) + j + 1) * W + l];
  }
}

int64_t groups_of(const AlignmentProblem& p) { return (p.batch + W - 1) / W; }

}  // namespace

void alignment_forward(const AlignmentForward& call, int threads) {
  const AlignmentProblem& p = call.problem;
  const int64_t room = round_up(Tables::room(p, false), 16);
  const int64_t workers = smaller(threads, groups_of(p));
  Scratch scratch(workers * room);
  parallel_for(groups_of(p), 1, static_cast<int>(larger(workers, 1)), [&](int64_t begin, int64_t end, int worker) {
    const Tables t = Tables::at(scratch.data + worker * room, p);
    for (int64_t k = begin; k < end; ++k) {
      const Group g = group_of(p, k);
      fill_sums(g, t, p.gamma);
      for (int64_t l = 0; l < g.count; ++l) call.values[g.first + l] = value_of(g, t, l);
    }
  });
}

void alignment_backward(const AlignmentBackward& call, int threads) {
  const AlignmentProblem& p = call.problem;
  const int64_t room = round_up(Tables::room(p, true), 16);
  const int64_t workers = smaller(threads, groups_of(p));
  Scratch scratch(workers * room);
  parallel_for(groups_of(p), 1, static_cast<int>(larger(workers, 1)), [&](int64_t begin, int64_t end, int worker) {
    const Tables t = Tables::at(scratch.data + worker * room, p);
    for (int64_t k = begin; k < end; ++k) {
      const Group g = group_of(p, k);
      fill_sums(g, t, p.gamma);
      const int64_t cells = (g.rows + 1) * (g.columns + 1);
      for (int64_t c = 0; c < cells; ++c) store(t.gradient + c * W, vf{});
      for (int64_t l = 0; l < g.count; ++l) {
        const int64_t n = g.row_length[l], m = g.column_length[l];
        if (n == 0 || m == 0 || value_of(g, t, l) == infinity) continue;
        t.gradient[(n * (g.columns + 1) + m) * W + l] = call.upstream[g.first + l];
      }
      if (p.gamma == 0.0f)
        hand_back<true>(g, t, {0.0f, 0.0f});
      else
        hand_back<false>(g, t, {p.gamma, 1.0f / p.gamma});
      unpack(g, t.gradient, call.gradient);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
