// Contrastive losses backward: logits are recomputed; one kernel serves both sides, with their roles exchanged.
//
// A block owns 64 rows of its side and 64 T columns of their gradient, and walks over the other side. Wider embeddings
// take several blocks, each of which computes the logits again. Sums for log(scale) and bias: one partial for each
// block of the rows' first columns, added in order.
#pragma once

#include "cuda/pair_positives.cuh"

namespace vlm::cuda {

struct PairSide {
  Matrix data;
  int64_t count;
  const float *lse, *gradient, *share;  // lse and share: softmax only
};

struct PairGradient {
  PairSide own, other;
  Positives positive;
  int64_t width;
  float scale, bias;
  MutableMatrix to;   // data may be null: only the sums are wanted
  double* sums;       // [blocks, 2], null for the side of columns
};

// d loss / d logit of one pair from its product times scale.
template <PairLoss loss>
VLM_DEVICE float pair_gradient(const PairGradient& g, int64_t i, int64_t j, float z) {
  const bool match = g.positive(i, j);
  if (loss == PairLoss::softmax) {
    const float own_share = g.own.share[i], other_share = g.other.share[j];
    float value = 0.0f;
    if (own_share > 0.0f) value += g.own.gradient[i] * (expf(z - g.own.lse[i]) - (match ? own_share : 0.0f));
    if (other_share > 0.0f) value += g.other.gradient[j] * (expf(z - g.other.lse[j]) - (match ? other_share : 0.0f));
    return value;
  }
  const float wrong = match ? -(z + g.bias) : z + g.bias, e = expf(-fabsf(wrong));
  const float share = (wrong >= 0.0f ? 1.0f : e) / (1.0f + e);  // sigmoid(wrong) without cancellation
  return (g.own.gradient[i] + g.other.gradient[j]) * (match ? -share : share);
}

VLM_DEVICE double block_sum(double value, double* room) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(all_lanes, value, bits);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < TILE_THREADS / 32; ++w) sum += room[w];
  return sum;
}

constexpr std::size_t PAIR_BACKWARD_SHARED =
    sizeof(float) * (3 * PAIR_SLICE_FLOATS) + 2 * sizeof(double) * TILE_THREADS / 32;

template <PairLoss loss, int T>
__global__ void __launch_bounds__(TILE_THREADS, 1) pair_gradient_kernel(PairGradient g) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  VLM_DYN_SMEM(float, own_slice);
  float* other_slice = own_slice + PAIR_SLICE_FLOATS;
  float* weight = other_slice + PAIR_SLICE_FLOATS;
  double* room = reinterpret_cast<double*>(weight + PAIR_SLICE_FLOATS);

  const int64_t chunks = g.to.data == nullptr ? 1 : pieces(g.width > 0 ? g.width : 1, 64 * T);
  const int64_t tile = blockIdx.x / chunks, chunk = blockIdx.x % chunks, i0 = tile * PAIR_TILE, e0 = chunk * 64 * T;
  const bool sums = g.sums != nullptr && chunk == 0;
  Accumulator<R, 1> gradient[T];
#pragma unroll
  for (int t = 0; t < T; ++t) gradient[t].clear();
  double scale_sum = 0.0, bias_sum = 0.0;

  for (int64_t j0 = 0; j0 < g.other.count; j0 += PAIR_TILE) {
    float s[R][C];
    pair_products(g.own.data, g.own.count, g.other.data, g.other.count, g.width, i0, j0, own_slice, other_slice, s);
    float scale_part = 0.0f, bias_part = 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t i = i0 + thread_row() * R + r, j = j0 + thread_column() + 16 * c;
        const float z = s[r][c] * g.scale;
        s[r][c] = i < g.own.count && j < g.other.count ? pair_gradient<loss>(g, i, j, z) : 0.0f;
        scale_part = fmaf(s[r][c], z, scale_part);
        bias_part += s[r][c];
      }
    scale_sum += scale_part;
    bias_sum += bias_part;
    if (g.to.data == nullptr) continue;
    put_scores(weight, PAIR_ROOM, s);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      __syncthreads();
      const int64_t e = e0 + 64 * t;
      if (e < g.width)
        load_tile<1>(other_slice, PAIR_TILE, g.other.data.data + j0 * g.other.data.row_stride + e,
                     g.other.data.row_stride, g.other.count - j0, g.width - e, always);
      __syncthreads();
      if (e < g.width) gradient[t].add_product(weight, PAIR_ROOM, other_slice, PAIR_TILE);
    }
  }

  if (sums) {
    const double scale_total = block_sum(scale_sum, room), bias_total = block_sum(bias_sum, room + TILE_THREADS / 32);
    if (threadIdx.x == 0) {
      g.sums[2 * tile] = scale_total;
      g.sums[2 * tile + 1] = bias_total;
    }
  }
  if (g.to.data == nullptr) return;
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r, e = e0 + 64 * t;
      if (i < g.own.count && e < g.width)
        gradient[t].store_row(g.to.data + i * g.to.row_stride + e, r, g.width - e, g.scale);
    }
}

// One block of one warp: sums of pairs of doubles in a fixed order.
__global__ void __launch_bounds__(32) pair_sums_kernel(const double* parts, int64_t count, double* dlog_scale,
                                                       double* dbias) {
  double scale = 0.0, bias = 0.0;
  for (int64_t k = threadIdx.x; k < count; k += 32) {
    scale += parts[2 * k];
    bias += parts[2 * k + 1];
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    scale += __shfl_xor_sync(all_lanes, scale, bits);
    bias += __shfl_xor_sync(all_lanes, bias, bits);
  }
  if (threadIdx.x != 0) return;
  *dlog_scale = scale;
  if (dbias != nullptr) *dbias = bias;
}

template <PairLoss loss, int T>
void launch_pair_gradient(const PairGradient& g, void* stream) {
  const int64_t tiles = pieces(g.own.count, PAIR_TILE);
  const int64_t chunks = g.to.data == nullptr ? 1 : pieces(g.width > 0 ? g.width : 1, 64 * T);
  if (tiles > 0)
    VLM_LAUNCH((pair_gradient_kernel<loss, T>), {blocks(tiles * chunks)}, {TILE_THREADS}, PAIR_BACKWARD_SHARED,
               stream, g);
}

}  // namespace vlm::cuda
