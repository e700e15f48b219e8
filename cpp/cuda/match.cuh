// Bipartite matching of tokens: even ones are sources, odd ones destinations; see vlm/tokens.hpp.
//
// A warp for each token finds its norm (and mean over heads); a block takes 64 sources past all destinations; a thread
// for each source counts how many precede it, a thread for each token where it ends up. Nothing is sorted: ranks are
// counts, so that equal cosines fall by index in any order of execution.
#pragma once

#include "cuda/pair_tile.cuh"

namespace vlm::cuda {

// What the kernels share, of one call.
struct MatchPlan {
  int64_t batch, length, width, sources, destinations, merged;
  int64_t first_source, first_destination;  // behind the protected ones
  MatchOrder order;
  const float* rows;  // the metric without heads
  int64_t batch_stride, row_stride;
  float *inverse, *best;  // [batch, length]: 1 / norm; [batch, sources]: the largest cosine
  int32_t *partner, *rank;  // [batch, sources]: its destination, and its place among unprotected sources
};

__global__ void __launch_bounds__(TILE_THREADS) token_norm_kernel(TokenMatch call, float* mean, float* inverse) {
  const int64_t token = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (token >= call.batch * call.length) return;  // a whole warp
  const float* row = call.metric + token / call.length * call.batch_stride + token % call.length * call.row_stride;
  const float share = 1.0f / float(call.heads);
  float squares = 0.0f;
  for (int64_t e = threadIdx.x % 32; e < call.width; e += 32) {
    float value = row[e];
    if (call.heads > 1) {
      for (int64_t h = 1; h < call.heads; ++h) value += row[h * call.head_stride + e];
      value *= share;
      mean[token * call.width + e] = value;
    }
    squares = fmaf(value, value, squares);
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) squares += __shfl_xor_sync(all_lanes, squares, bits);
  if (threadIdx.x % 32 == 0) inverse[token] = 1.0f / fmaxf(sqrtf(squares), 1e-12f);
}

__global__ void __launch_bounds__(TILE_THREADS, 2) token_partner_kernel(MatchPlan m) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, source_slice);
  float* destination_slice = source_slice + PAIR_SLICE_FLOATS;
  const int64_t tiles = pieces(m.sources, PAIR_TILE), b = blockIdx.x / tiles, i0 = blockIdx.x % tiles * PAIR_TILE;
  const float *rows = m.rows + b * m.batch_stride, *inverse = m.inverse + b * m.length;
  const Matrix sources{rows, 2 * m.row_stride}, destinations{rows + m.row_stride, 2 * m.row_stride};
  float value[R];
  int index[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    value[r] = minus_infinity();
    index[r] = int(m.first_destination);
  }
  for (int64_t j0 = m.first_destination / PAIR_TILE * PAIR_TILE; j0 < m.destinations; j0 += PAIR_TILE) {
    float s[R][C];
    pair_products(sources, m.sources, destinations, m.destinations, m.width, i0, j0, source_slice, destination_slice,
                  s);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t j = j0 + thread_column() + 16 * c;
      if (j < m.first_destination || j >= m.destinations) continue;
      const float factor = inverse[2 * j + 1];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float cosine = s[r][c] * factor;
        if (!(cosine > value[r])) continue;  // equals: the lowest index stays; NaN never wins
        value[r] = cosine;
        index[r] = int(j);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int bits = 8; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(all_lanes, value[r], bits);
      const int at = __shfl_xor_sync(all_lanes, index[r], bits);
      if (other > value[r] || (other == value[r] && at < index[r])) {
        value[r] = other;
        index[r] = at;
      }
    }
    const int64_t i = i0 + thread_row() * R + r;
    if (i >= m.sources || thread_column() != 0) continue;
    const float cosine = value[r] * inverse[2 * i];
    m.best[b * m.sources + i] = cosine == cosine ? cosine : minus_infinity();
    m.partner[b * m.sources + i] = index[r];
  }
}

__global__ void __launch_bounds__(TILE_THREADS) token_rank_kernel(MatchPlan m) {
  const int64_t at = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x;
  if (at >= m.batch * m.sources) return;
  const int64_t a = at % m.sources;
  const float *best = m.best + (at - a), own = best[a];
  int before = 0;
  for (int64_t other = m.first_source; other < m.sources; ++other)
    before += best[other] > own || (best[other] == own && other < a);
  m.rank[at] = a < m.first_source ? INT32_MAX : before;
}

__global__ void __launch_bounds__(TILE_THREADS) token_place_kernel(TokenMatch call, MatchPlan m) {
  const int64_t at = int64_t(blockIdx.x) * TILE_THREADS + threadIdx.x;
  if (at >= m.batch * m.length) return;
  const int64_t b = at / m.length, n = at % m.length;
  const int32_t *rank = m.rank + b * m.sources, *partner = m.partner + b * m.sources;
  const auto leaves = [&](int64_t a) { return m.merged > 0 && rank[a] < m.merged; };
  const auto left_before = [&](int64_t end) {  // sources below `end` that are merged
    int64_t count = 0;
    for (int64_t a = m.first_source; m.merged > 0 && a < end; ++a) count += leaves(a);
    return count;
  };
  const auto place = [&](int64_t token) {
    if (m.order == MatchOrder::position) return token - left_before((token + 1) / 2);
    const int64_t half = token / 2;
    if (token % 2 == 1) return m.sources - m.merged + half;
    if (m.order == MatchOrder::sources_first) return half - left_before(half);
    return half < m.first_source ? half : m.first_source + rank[half] - m.merged;
  };
  const bool gone = n % 2 == 0 && leaves(n / 2);
  const int64_t target = gone ? 2 * int64_t(partner[n / 2]) + 1 : n, to = place(target);
  call.assign[at] = to;
  if (gone) {
    call.source[b * m.merged + rank[n / 2]] = n;
    call.target[b * m.merged + rank[n / 2]] = target;
  } else {
    call.kept[b * (m.length - m.merged) + to] = n;
  }
}

}  // namespace vlm::cuda
