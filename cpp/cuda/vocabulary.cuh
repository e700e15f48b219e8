// Cross-entropy over the vocabulary, fused with its linear map: logits exist as tiles of 64 x 64 in registers alone.
//
// Forward: a block takes 64 rows and a chunk of ids and leaves a partial of each row; the partials are merged in the
// order of chunks. Backward: logits are recomputed; one kernel serves both sides. A block owns 64 rows (or 64 ids) and
// 64 T columns of their gradient, and walks over the other side.
#pragma once

#include "cuda/pair_tile.cuh"

namespace vlm::cuda {

constexpr int64_t VOCABULARY_CHUNK = 16 * PAIR_TILE;  // ids

// Of one row and one chunk: greatest logit, sum of exp(z - greatest), sum of z.
struct RowPart {
  float top, sum, all;
};

// The logit of a product of row i and id v.
VLM_DEVICE float vocabulary_logit(const VocabularyProblem& p, int64_t v, float product) {
  const float t = p.bias == nullptr ? product : product + p.bias[v];
  return p.softcap > 0.0f ? p.softcap * tanhf(t / p.softcap) : t;
}

__global__ void __launch_bounds__(TILE_THREADS, 2)
    vocabulary_forward_kernel(VocabularyProblem p, RowPart* parts, float* own_logits) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, row_slice);
  float* id_slice = row_slice + PAIR_SLICE_FLOATS;
  const int64_t tiles = pieces(p.rows, PAIR_TILE), chunk = blockIdx.x / tiles;
  const int64_t i0 = blockIdx.x % tiles * PAIR_TILE, first = chunk * VOCABULARY_CHUNK;
  const int64_t last = smaller(first + VOCABULARY_CHUNK, p.ids);
  float top[R], sum[R], all[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    top[r] = minus_infinity();
    sum[r] = all[r] = 0.0f;
  }
  for (int64_t j0 = first; j0 < last; j0 += PAIR_TILE) {
    float s[R][C];
    pair_products(p.hidden, p.rows, p.weight, p.ids, p.width, i0, j0, row_slice, id_slice, s);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r, label = i < p.rows ? p.labels[i] : -1;
      float high = minus_infinity();
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t v = j0 + thread_column() + 16 * c;
        const bool there = i < p.rows && v < p.ids;
        s[r][c] = there ? vocabulary_logit(p, v, s[r][c]) : minus_infinity();
        if (there) all[r] += s[r][c];
        if (there && v == label) own_logits[i] = s[r][c];
        high = fmaxf(high, s[r][c]);
      }
      add_to_row(s[r], high, top[r], sum[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    const float total = row_sum(all[r]);
    if (i < p.rows && thread_column() == 0) parts[chunk * p.rows + i] = {top[r], sum[r], total};
  }
}

// A thread for each row.
__global__ void __launch_bounds__(TILE_THREADS)
    vocabulary_rows_kernel(VocabularyForward call, const RowPart* parts, const float* own_logits) {
  const VocabularyProblem& p = call.problem;
  const int64_t i = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x, chunks = pieces(p.ids, VOCABULARY_CHUNK);
  if (i >= p.rows) return;
  float top = minus_infinity();
  for (int64_t k = 0; k < chunks; ++k) top = fmaxf(top, parts[k * p.rows + i].top);
  if (top == minus_infinity()) {  // nothing can be chosen
    call.lse[i] = call.log_p[i] = minus_infinity();
    call.loss[i] = INFINITY;
    return;
  }
  double sum = 0.0, all = 0.0;
  for (int64_t k = 0; k < chunks; ++k) {
    const RowPart part = parts[k * p.rows + i];
    if (part.sum > 0.0f) sum += double(part.sum) * exp(double(part.top) - double(top));
    all += part.all;
  }
  const bool has_label = p.labels[i] >= 0;
  const double own = has_label ? own_logits[i] : 0.0, log_sum = log(sum), lse = top + log_sum;
  double loss = has_label ? log_sum + (double(top) - own) : lse;
  call.log_p[i] = has_label ? float(-loss) : 0.0f;
  if (has_label && p.smoothing > 0.0f) loss += p.smoothing * (own - all / double(p.ids));
  call.loss[i] = float(loss + p.z_loss * lse * lse);
  call.lse[i] = float(lse);
}

// d loss / d product of row i and id v.
VLM_DEVICE float vocabulary_gradient(const VocabularyBackward& call, int64_t i, int64_t v, float product) {
  const VocabularyProblem& p = call.problem;
  const float factor = call.factors == nullptr ? 1.0f : call.factors[i], lse = call.lse[i];
  if (factor == 0.0f || lse == minus_infinity()) return 0.0f;
  const float z = vocabulary_logit(p, v, product);
  const int64_t label = p.labels[i];
  const float smoothing = label >= 0 ? p.smoothing : 0.0f;
  float value = expf(z - lse) * (1.0f + 2.0f * p.z_loss * lse) - smoothing / float(p.ids);
  if (v == label) value -= 1.0f - smoothing;
  const float share = p.softcap > 0.0f ? z / p.softcap : 0.0f;
  return factor * value * (1.0f - share * share);
}

constexpr std::size_t VOCABULARY_BACKWARD_SHARED = sizeof(float) * 3 * PAIR_SLICE_FLOATS;

// by_ids: the block owns ids, else rows.
template <bool by_ids, int T>
__global__ void __launch_bounds__(TILE_THREADS, 1) vocabulary_gradient_kernel(VocabularyBackward call) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, own_slice);
  float* other_slice = own_slice + PAIR_SLICE_FLOATS;
  float* weight = other_slice + PAIR_SLICE_FLOATS;
  const VocabularyProblem& p = call.problem;
  const Matrix own = by_ids ? p.weight : p.hidden, other = by_ids ? p.hidden : p.weight;
  const int64_t owned = by_ids ? p.ids : p.rows, others = by_ids ? p.rows : p.ids;
  const MutableMatrix to = by_ids ? call.dweight : call.dhidden;

  const int64_t chunks = to.data == nullptr ? 1 : pieces(p.width > 0 ? p.width : 1, 64 * T);
  const int64_t i0 = blockIdx.x / chunks * PAIR_TILE, e0 = blockIdx.x % chunks * 64 * T;
  Accumulator<R, 1> gradient[T];
#pragma unroll
  for (int t = 0; t < T; ++t) gradient[t].clear();
  float sum[R] = {};

  for (int64_t j0 = 0; j0 < others; j0 += PAIR_TILE) {
    float s[R][C];
    pair_products(own, owned, other, others, p.width, i0, j0, own_slice, other_slice, s);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t i = i0 + thread_row() * R + r, j = j0 + thread_column() + 16 * c;
        const bool there = i < owned && j < others;
        s[r][c] = there ? vocabulary_gradient(call, by_ids ? j : i, by_ids ? i : j, s[r][c]) : 0.0f;
        if (by_ids) sum[r] += s[r][c];
      }
    }
    if (to.data == nullptr) continue;
    put_scores(weight, PAIR_ROOM, s);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      __syncthreads();
      const int64_t e = e0 + 64 * t;
      if (e < p.width)
        load_tile<1>(other_slice, PAIR_TILE, other.data + j0 * other.row_stride + e, other.row_stride, others - j0,
                     p.width - e, always);
      __syncthreads();
      if (e < p.width) gradient[t].add_product(weight, PAIR_ROOM, other_slice, PAIR_TILE);
    }
  }

#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    const float total = by_ids ? row_sum(sum[r]) : 0.0f;
    if (i >= owned) continue;
    if (by_ids && call.dbias != nullptr && e0 == 0 && thread_column() == 0) call.dbias[i] = total;
    if (to.data == nullptr) continue;
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const int64_t e = e0 + 64 * t;
      if (e < p.width) gradient[t].store_row(to.data + i * to.row_stride + e, r, p.width - e, 1.0f);
    }
  }
}

template <bool by_ids, int T>
void launch_vocabulary_gradient(const VocabularyBackward& call, void* stream) {
  const VocabularyProblem& p = call.problem;
  const bool sums_alone = (by_ids ? call.dweight : call.dhidden).data == nullptr;
  const int64_t count =
      pieces(by_ids ? p.ids : p.rows, PAIR_TILE) * (sums_alone ? 1 : pieces(p.width > 0 ? p.width : 1, 64 * T));
  if (count > 0)
    VLM_LAUNCH((vocabulary_gradient_kernel<by_ids, T>), {blocks(count)}, {TILE_THREADS}, VOCABULARY_BACKWARD_SHARED,
               stream, call);
}

}  // namespace vlm::cuda
