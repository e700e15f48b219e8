// Exact attention backward in bf16 on tensor cores, deterministic: like attention_backward.cuh, with the products of
// attention_mma.cuh. A block of 4 warps owns 64 rows of its side, a warp 16 of them; the other side comes in tiles that
// are copied while the last one is worked on. Probabilities and their gradients stay in registers as left operands.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_mma.cuh"

namespace vlm::cuda {

struct AttentionBackwardBf16 {
  AttentionProblem problem;  // as in AttentionForwardBf16
  HalfHeads q, k, v, out;
  const float* lse;
  HalfHeads dout;
  const float* dlse;  // contiguous like lse, or null for zero
  MutableHalfHeads dq, dk, dv;
};

template <int W>
struct MmaBackwardShape {
  // Rows of a tile of the other side. A block that owns keys holds two gradients: wide rows leave room for few scores.
  static constexpr int threads = MmaShape<W>::threads, own = 64, queries = W == 64 ? 64 : 16, keys = W == 64 ? 64 : 32;
  using KeyBits = PairBits<queries, own>;  // of a block that owns keys
  using QueryBits = PairBits<own, keys>;
  static constexpr std::size_t keys_shared =
      sizeof(uint16_t) * (2 * own + 4 * queries) * W + sizeof(uint32_t) * KeyBits::words;
  static constexpr std::size_t queries_shared =
      sizeof(uint16_t) * (2 * own + 4 * keys) * W + sizeof(uint32_t) * QueryBits::words;
};

__global__ void __launch_bounds__(TILE_THREADS, 1)
    attention_delta_bf16_kernel(AttentionBackwardBf16 call, float* delta) {
  put_delta(call, delta);
}

// s = the 16 rows of this warp in `own` times the N rows of `other`.
template <int W, int N>
VLM_DEVICE void mma_products(uint16_t* own, uint16_t* other, float (&s)[N / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  clear(s);
#pragma unroll(W == 64 ? 4 : 1)  // addresses of eight steps would not fit the registers
  for (int k = 0; k < W / 16; ++k) {
    uint32_t left[4];
    load_matrices<false>(left, chunk_at<W>(own, 16 * warp + lane % 16, 16 * k + lane / 16 * 8));
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t right[4];
      load_matrices<false>(right, chunk_at<W>(other, 8 * n + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
      mma_bf16(s[n], left, {right[0], right[1]});
      mma_bf16(s[n + 1], left, {right[2], right[3]});
    }
  }
}

// Starts the copies of N queries of a head from i0 on and of the gradients of their outputs.
template <int W, int N>
VLM_DEVICE void fetch_queries(const AttentionBackwardBf16& call, int64_t b, int64_t h, int64_t i0, uint16_t* query,
                              uint16_t* dout) {
  const AttentionProblem& p = call.problem;
  const auto every = [](int) { return true; };
  fetch_tile<W, N>(query, head_of(call.q, b, h) + i0 * call.q.row_stride, call.q.row_stride, p.queries - i0, p.width,
                   every);
  fetch_tile<W, N>(dout, head_of(call.dout, b, h) + i0 * call.dout.row_stride, call.dout.row_stride, p.queries - i0,
                   p.value_width, every);
}

template <int W>
__global__ void __launch_bounds__(MmaBackwardShape<W>::threads, 2)
    attention_mma_keys_kernel(AttentionBackwardBf16 call, const __grid_constant__ MaskProgram program,
                              const float* delta) {
  using Shape = MmaBackwardShape<W>;
  constexpr int N = Shape::queries, TILE = N * W;
  VLM_DYN_SMEM(uint16_t, key);
  uint16_t* value = key + Shape::own * W;
  uint16_t* queries_at = value + Shape::own * W;
  uint16_t* douts_at = queries_at + 2 * TILE;
  typename Shape::KeyBits bits{reinterpret_cast<uint32_t*>(douts_at + 2 * TILE), false};

  const AttentionProblem& p = call.problem;
  const KeyBlock own = key_block(p, p.key_heads, Shape::own);
  const int64_t b = own.b, g = own.h, j0 = own.j0, j1 = own.j1, group = p.query_heads / p.key_heads;
  const HeadMask keys{program, b, g};  // for the key mask alone
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // The other side: tiles of queries of each head of the group, one after the other.
  const int64_t query_tiles = pieces(p.queries, N), end = group * query_tiles;
  const auto next = [&](int64_t at) {
    for (; at < end; ++at) {
      const int64_t i0 = at % query_tiles * N;
      const HeadMask mask{program, b, g * group + at / query_tiles};
      if (mask.cover(i0, smaller(i0 + N, p.queries), j0, j1) != Cover::skip) break;
    }
    return at;
  };
  const auto fetch = [&](int stage, int64_t at) {
    fetch_queries<W, N>(call, b, g * group + at / query_tiles, at % query_tiles * N, queries_at + stage * TILE,
                        douts_at + stage * TILE);
  };

  const auto exists = [&](int row) { return keys.exists(j0 + row); };
  fetch_tile<W, Shape::own>(key, head_of(call.k, b, g) + j0 * call.k.row_stride, call.k.row_stride, j1 - j0, p.width,
                            exists);
  fetch_tile<W, Shape::own>(value, head_of(call.v, b, g) + j0 * call.v.row_stride, call.v.row_stride, j1 - j0,
                            p.value_width, exists);
  float dk[W / 8][4], dv[W / 8][4];
  clear(dk);
  clear(dv);
  bool there[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t j = j0 + 16 * warp + lane / 4 + 8 * r;
    there[r] = j < p.keys && keys.exists(j);
  }
  int stage = 0;
  int64_t at = next(0);
  if (at < end) fetch(0, at);
  copy_commit();
  while (at < end) {
    const int64_t after = next(at + 1), h = g * group + at / query_tiles, i0 = at % query_tiles * N;
    const HeadMask mask{program, b, h};
    const int64_t first_row = (b * p.query_heads + h) * p.queries + i0;
    const float *lses = call.lse + first_row, *shifts = delta + first_row;
    const int count = int(smaller(p.queries - i0, int64_t(N)));
    const float* bias = bias_of(p, b, h);
    if (after < end) fetch(1 - stage, after);
    copy_commit();
    bits.template fill<Shape::threads>(mask, mask.cover(i0, smaller(i0 + N, p.queries), j0, j1), i0, j0);
    copy_wait<1>();
    __syncthreads();
    uint16_t* query = queries_at + stage * TILE;
    uint16_t* dout = douts_at + stage * TILE;

    float s[N / 8][4], gradient[N / 8][4];
    mma_products<W, N>(key, query, s);
    mma_products<W, N>(value, dout, gradient);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key_at = 16 * warp + lane / 4 + 8 * (e / 2), query_at = 8 * n + 2 * (lane % 4) + e % 2;
        const bool allowed = query_at < count && there[e / 2] && bits.allows(query_at, key_at);
        const float lse = allowed ? lses[query_at] : minus_infinity();
        s[n][e] = probability(p, allowed, bias, i0 + query_at, j0 + key_at, s[n][e], lse);
        gradient[n][e] = s[n][e] == 0.0f ? 0.0f : s[n][e] * (gradient[n][e] - shifts[query_at]);
      }
    mma_add<W, N>(dv, s, dout);
    mma_add<W, N>(dk, gradient, query);
    __syncthreads();
    at = after;
    stage = 1 - stage;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t j = j0 + 16 * warp + lane / 4 + 8 * r;
    if (j >= p.keys) continue;
    store_bf16(head_of(call.dk, b, g) + j * call.dk.row_stride, dk, r, p.width, p.scale);
    store_bf16(head_of(call.dv, b, g) + j * call.dv.row_stride, dv, r, p.value_width, 1.0f);
  }
}

template <int W>
__global__ void __launch_bounds__(MmaBackwardShape<W>::threads, 2)
    attention_mma_queries_kernel(AttentionBackwardBf16 call, const __grid_constant__ MaskProgram program,
                                 const float* delta) {
  using Shape = MmaBackwardShape<W>;
  constexpr int N = Shape::keys, TILE = N * W;
  VLM_DYN_SMEM(uint16_t, query);
  uint16_t* dout = query + Shape::own * W;
  uint16_t* keys_at = dout + Shape::own * W;
  uint16_t* values_at = keys_at + 2 * TILE;
  typename Shape::QueryBits bits{reinterpret_cast<uint32_t*>(values_at + 2 * TILE), false};

  const AttentionProblem& p = call.problem;
  const QueryBlock own = query_block(p, Shape::own);
  const int64_t b = own.b, h = own.h, i0 = own.i0, i1 = own.i1, first_row = own.head * p.queries;
  const HeadMask mask{program, b, h};
  const float* bias = bias_of(p, b, h);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto fetch = [&](int stage, int64_t j0) {
    fetch_keys<W, N>(call, mask, j0, keys_at + stage * TILE, values_at + stage * TILE);
  };
  fetch_queries<W, Shape::own>(call, b, h, i0, query, dout);
  float dq[W / 8][4], lse[2], shift[2];
  clear(dq);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t i = i0 + 16 * warp + lane / 4 + 8 * r;
    lse[r] = i < p.queries ? call.lse[first_row + i] : minus_infinity();
    shift[r] = i < p.queries ? delta[first_row + i] : 0.0f;
  }
  int stage = 0;
  int64_t j0 = next_tile(mask, i0, i1, 0, p.keys, N);
  if (j0 < p.keys) fetch(0, j0);
  copy_commit();
  while (j0 < p.keys) {
    const int64_t after = next_tile(mask, i0, i1, j0 + N, p.keys, N);
    if (after < p.keys) fetch(1 - stage, after);
    copy_commit();
    bits.template fill<Shape::threads>(mask, mask.cover(i0, i1, j0, smaller(j0 + N, p.keys)), i0, j0);
    copy_wait<1>();
    __syncthreads();
    uint16_t* key = keys_at + stage * TILE;
    uint16_t* value = values_at + stage * TILE;

    float s[N / 8][4], gradient[N / 8][4];
    mma_products<W, N>(query, key, s);
    mma_products<W, N>(dout, value, gradient);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query_at = 16 * warp + lane / 4 + 8 * (e / 2), key_at = 8 * n + 2 * (lane % 4) + e % 2;
        const int64_t i = i0 + query_at, j = j0 + key_at;
        const bool allowed = j < p.keys && mask.exists(j) && bits.allows(query_at, key_at);
        const float weight = probability(p, allowed, bias, i, j, s[n][e], lse[e / 2]);
        s[n][e] = weight == 0.0f ? 0.0f : weight * (gradient[n][e] - shift[e / 2]);
      }
    mma_add<W, N>(dq, s, key);
    __syncthreads();
    j0 = after;
    stage = 1 - stage;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t i = i0 + 16 * warp + lane / 4 + 8 * r;
    if (i < p.queries) store_bf16(head_of(call.dq, b, h) + i * call.dq.row_stride, dq, r, p.width, p.scale);
  }
}

template <int W>
void launch_attention_mma_backward(const AttentionBackwardBf16& call, const MaskProgram& mask, float* delta,
                                   void* stream) {
  using Shape = MmaBackwardShape<W>;
  const AttentionProblem& p = call.problem;
  if (const unsigned count = delta_blocks(p))
    VLM_LAUNCH(attention_delta_bf16_kernel, {count}, {TILE_THREADS}, 0, stream, call, delta);
  if (const unsigned count = key_blocks(p, p.key_heads, Shape::own))
    VLM_LAUNCH(attention_mma_keys_kernel<W>, {count}, {Shape::threads}, Shape::keys_shared, stream, call, mask, delta);
  if (const unsigned count = query_blocks(p, Shape::own))
    VLM_LAUNCH(attention_mma_queries_kernel<W>, {count}, {Shape::threads}, Shape::queries_shared, stream, call, mask,
               delta);
}

}  // namespace vlm::cuda
