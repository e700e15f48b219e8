// Exact attention forward in bf16 on tensor cores: mma.sync m16n8k16, double-buffered cp.async, float32 statistics.
//
// A block of 4 warps owns 64 queries, a warp 16 of them; keys come in tiles of 64. Scores stay in registers: the layout
// of the accumulator of Q K^T is that of the left operand of P V. Rows in shared memory hold chunks of 16 bytes, which
// are exchanged by the row number so that ldmatrix meets no bank twice.
#pragma once

#include "cuda/attention_scores.cuh"

namespace vlm::cuda {

struct HalfHeads {
  const uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct MutableHalfHeads {
  uint16_t* data;
  int64_t batch_stride, head_stride, row_stride;
};

// A call whose arrays hold bf16; the q, k, v of its problem are not looked at.
struct AttentionForwardBf16 {
  AttentionProblem problem;
  HalfHeads q, k, v;
  MutableHalfHeads out;
  float* lse;
};

inline HalfHeads halves(const Heads& t) {
  return {reinterpret_cast<const uint16_t*>(t.data), t.batch_stride, t.head_stride, t.row_stride};
}
inline MutableHalfHeads halves(const MutableHeads& t) {
  return {reinterpret_cast<uint16_t*>(t.data), t.batch_stride, t.head_stride, t.row_stride};
}

// W: columns of a row in shared memory, 64 or 128; both widths are at most that.
template <int W>
struct MmaShape {
  static constexpr int threads = 128, queries = 64, keys = 64, tile = keys * W;
  using Bits = PairBits<queries, keys>;
  static constexpr std::size_t shared_bytes =
      sizeof(uint16_t) * (queries * W + 4 * tile) + sizeof(uint32_t) * Bits::words;
};

VLM_BOTH const uint16_t* head_of(const HalfHeads& t, int64_t b, int64_t h) {
  return t.data + b * t.batch_stride + h * t.head_stride;
}

template <int W>
VLM_DEVICE uint16_t* chunk_at(uint16_t* tile, int row, int column) {
  return tile + row * W + ((column / 8) ^ (row % 8)) * 8;
}

VLM_BOTH uint16_t* head_of(const MutableHalfHeads& t, int64_t b, int64_t h) {
  return t.data + b * t.batch_stride + h * t.head_stride;
}

// Starts the copy of `rows` rows; what does not exist becomes 0.
template <int W, int rows, class Exists>
VLM_DEVICE void fetch_tile(uint16_t* to, const uint16_t* from, int64_t row_stride, int64_t count, int64_t width,
                           Exists exists) {
#pragma unroll 4
  for (int at = threadIdx.x; at < rows * W / 8; at += MmaShape<W>::threads) {
    const int row = at / (W / 8), column = at % (W / 8) * 8;
    int bytes = 0;
    if (row < count && column < width && exists(row)) bytes = int(smaller(width - column, int64_t(8))) * 2;
    copy_async_16(chunk_at<W>(to, row, column), bytes == 0 ? from : from + row * row_stride + column, bytes);
  }
}

// Starts the copies of N keys and values from j0 on, of the head that the mask's head reads.
template <int W, int N, class Call>
VLM_DEVICE void fetch_keys(const Call& call, const HeadMask& mask, int64_t j0, uint16_t* key, uint16_t* value) {
  const AttentionProblem& p = call.problem;
  const int64_t b = mask.b, g = mask.h / (p.query_heads / p.key_heads);
  const auto exists = [&](int row) { return mask.exists(j0 + row); };
  fetch_tile<W, N>(key, head_of(call.k, b, g) + j0 * call.k.row_stride, call.k.row_stride, p.keys - j0, p.width,
                   exists);
  fetch_tile<W, N>(value, head_of(call.v, b, g) + j0 * call.v.row_stride, call.v.row_stride, p.keys - j0,
                   p.value_width, exists);
}

// Row lane / 4 + 8 r of this warp's 16 rows, times a factor.
template <int COLUMNS>
VLM_DEVICE void store_bf16(uint16_t* to, const float (&values)[COLUMNS][4], int r, int64_t width, float factor) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n) {
    const int column = 8 * n + 2 * (threadIdx.x % 4);
    const uint32_t pair = pack_bf16(values[n][2 * r] * factor, values[n][2 * r + 1] * factor);
    if (column < width) to[column] = uint16_t(pair);
    if (column + 1 < width) to[column + 1] = uint16_t(pair >> 16);
  }
}

// out += s other for the 16 rows of this warp, s rounded to bf16.
template <int W, int N>
VLM_DEVICE void mma_add(float (&out)[W / 8][4], const float (&s)[N / 8][4], uint16_t* other) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    const uint32_t weights[4] = {pack_bf16(s[2 * k][0], s[2 * k][1]), pack_bf16(s[2 * k][2], s[2 * k][3]),
                                 pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]),
                                 pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < W / 8; n += 2) {
      uint32_t right[4];
      load_matrices<true>(right, chunk_at<W>(other, 16 * k + lane % 16, 8 * n + lane / 16 * 8));
      mma_bf16(out[n], weights, {right[0], right[1]});
      mma_bf16(out[n + 1], weights, {right[2], right[3]});
    }
  }
}

// The first tile of keys at or after j0 that the queries [i0, i1) may see.
VLM_DEVICE int64_t next_tile(const HeadMask& mask, int64_t i0, int64_t i1, int64_t j0, int64_t keys, int tile) {
  while (j0 < keys && mask.cover(i0, i1, j0, smaller(j0 + tile, keys)) == Cover::skip) j0 += tile;
  return j0;
}

VLM_DEVICE float quad_sum(float v) {
  v += __shfl_xor_sync(all_lanes, v, 1);
  return v + __shfl_xor_sync(all_lanes, v, 2);
}
VLM_DEVICE float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(all_lanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(all_lanes, v, 2));
}

template <int W>
__global__ void __launch_bounds__(MmaShape<W>::threads, 2)
    attention_mma_kernel(AttentionForwardBf16 call, const __grid_constant__ MaskProgram program) {
  using Shape = MmaShape<W>;
  constexpr int STEPS = W / 16, TILES = Shape::keys / 8, COLUMNS = W / 8;
  VLM_DYN_SMEM(uint16_t, query);
  uint16_t* keys_at = query + Shape::queries * W;
  uint16_t* values_at = keys_at + 2 * Shape::tile;
  typename Shape::Bits bits{reinterpret_cast<uint32_t*>(values_at + 2 * Shape::tile), false};

  const AttentionProblem& p = call.problem;
  const QueryBlock own = query_block(p, Shape::queries);
  const int64_t b = own.b, h = own.h, i0 = own.i0, i1 = own.i1;
  const HeadMask mask{program, b, h};
  const float* bias = bias_of(p, b, h);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const auto fetch = [&](int stage, int64_t j0) {
    fetch_keys<W, Shape::keys>(call, mask, j0, keys_at + stage * Shape::tile, values_at + stage * Shape::tile);
  };

  fetch_tile<W, Shape::queries>(query, head_of(call.q, b, h) + i0 * call.q.row_stride, call.q.row_stride, i1 - i0,
                                p.width, [](int) { return true; });
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  uint32_t left[STEPS][4];
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
    load_matrices<false>(left[k], chunk_at<W>(query, 16 * warp + lane % 16, 16 * k + lane / 16 * 8));

  float out[COLUMNS][4], top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;

  int stage = 0;
  int64_t j0 = next_tile(mask, i0, i1, 0, p.keys, Shape::keys);
  if (j0 < p.keys) fetch(0, j0);
  copy_commit();
  while (j0 < p.keys) {
    const int64_t after = next_tile(mask, i0, i1, j0 + Shape::keys, p.keys, Shape::keys);
    if (after < p.keys) fetch(1 - stage, after);
    copy_commit();
    bits.template fill<Shape::threads>(mask, mask.cover(i0, i1, j0, smaller(j0 + Shape::keys, p.keys)), i0, j0);
    copy_wait<1>();
    __syncthreads();
    uint16_t* key = keys_at + stage * Shape::tile;
    uint16_t* value = values_at + stage * Shape::tile;

    float s[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = s[n + 1][e] = 0.0f;
#pragma unroll
      for (int k = 0; k < STEPS; ++k) {
        uint32_t right[4];
        load_matrices<false>(right, chunk_at<W>(key, 8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
        mma_bf16(s[n], left[k], {right[0], right[1]});
        mma_bf16(s[n + 1], left[k], {right[2], right[3]});
      }
    }
    // This thread holds rows lane / 4 and lane / 4 + 8, of each tile of 8 keys two neighbours.
    float high[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query_at = 16 * warp + lane / 4 + 8 * (e / 2), key_at = 8 * n + 2 * (lane % 4) + e % 2;
        const int64_t i = i0 + query_at, j = j0 + key_at;
        const bool allowed = j < p.keys && mask.exists(j) && bits.allows(query_at, key_at);
        s[n][e] = logit(p, allowed, bias, i, j, s[n][e]);
        high[e / 2] = fmaxf(high[e / 2], s[n][e]);
      }
    float shrink[2], part[2] = {0.0f, 0.0f}, reference[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float now = fmaxf(top[r], quad_max(high[r]));
      reference[r] = now == minus_infinity() ? 0.0f : now;
      shrink[r] = expf(top[r] - reference[r]);
      top[r] = now;
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = expf(s[n][e] - reference[e / 2]);
        part[e / 2] += s[n][e];
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = sum[r] * shrink[r] + quad_sum(part[r]);
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
    mma_add<W, Shape::keys>(out, s, value);
    __syncthreads();
    j0 = after;
    stage = 1 - stage;
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t i = i0 + 16 * warp + lane / 4 + 8 * r;
    if (i >= p.queries) continue;
    const float factor = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
    store_bf16(head_of(call.out, b, h) + i * call.out.row_stride, out, r, p.value_width, factor);
    if (lane % 4 == 0)
      call.lse[(b * p.query_heads + h) * p.queries + i] = sum[r] > 0.0f ? top[r] + logf(sum[r]) : minus_infinity();
  }
}

template <int W>
void launch_attention_mma(const AttentionForwardBf16& call, const MaskProgram& mask, void* stream) {
  using Shape = MmaShape<W>;
  const AttentionProblem& p = call.problem;
  if (const unsigned count = query_blocks(p, Shape::queries))
    VLM_LAUNCH(attention_mma_kernel<W>, {count}, {Shape::threads}, Shape::shared_bytes, stream, call, mask);
}

}  // namespace vlm::cuda
