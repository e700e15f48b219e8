// Exact attention backward in float32, deterministic: every output has one writer and a fixed order of its sums.
//
// Probabilities are recomputed from lse. A kernel over tiles of keys writes dK and dV, one over tiles of queries dQ,
// and one over tiles of the bias its gradient, which loops over the batch and heads that share it.
#pragma once

#include "cuda/attention_scores.cuh"

namespace vlm::cuda {

// T: steps of 64 columns. R: own rows / 16; the other side comes in tiles of 32.
template <int T>
struct BackwardShape {
  static constexpr int R = T == 4 ? 2 : 4, C = 2, own = 16 * R, other = 16 * C, room = row_room<T>;
  static constexpr int weight_room = other + 4;
  using KeyBits = PairBits<other, own>;  // of a block that owns keys
  using QueryBits = PairBits<own, other>;
  static constexpr std::size_t shared_bytes =
      sizeof(float) * (2 * (own + other) * room + own * weight_room + KeyBits::words);
};

// delta_i = <dout_i, out_i> - dlse_i, a warp for each row; of float32 or bf16.
VLM_DEVICE float number(float value) { return value; }
VLM_DEVICE float number(uint16_t half) { return float_of_bf16(half); }

template <class Call>
VLM_DEVICE void put_delta(const Call& call, float* delta) {
  const AttentionProblem& p = call.problem;
  const int64_t row = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (row >= p.batch * p.query_heads * p.queries) return;  // a whole warp
  const int64_t i = row % p.queries, h = row / p.queries % p.query_heads, b = row / p.queries / p.query_heads;
  const auto* out = head_of(call.out, b, h) + i * call.out.row_stride;
  const auto* dout = head_of(call.dout, b, h) + i * call.dout.row_stride;
  float sum = 0.0f;
  for (int64_t e = threadIdx.x % 32; e < p.value_width; e += 32) sum = fmaf(number(out[e]), number(dout[e]), sum);
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(all_lanes, sum, bits);
  if (threadIdx.x % 32 == 0) delta[row] = sum - (call.dlse == nullptr ? 0.0f : call.dlse[row]);
}
inline unsigned delta_blocks(const AttentionProblem& p) {
  return blocks(pieces(p.batch * p.query_heads * p.queries, TILE_THREADS / 32));
}

__global__ void __launch_bounds__(TILE_THREADS, 1) attention_delta_kernel(AttentionBackward call, float* delta) {
  put_delta(call, delta);
}

// Probability of a pair from its product; 0 for removed pairs and rows without any key.
VLM_DEVICE float probability(const AttentionProblem& p, bool allowed, const float* bias, int64_t i, int64_t j,
                             float product, float lse) {
  const float s = logit(p, allowed, bias, i, j, product);
  return s == minus_infinity() || lse == minus_infinity() ? 0.0f : expf(s - lse);
}

// Keys and values j0 .. j1 of a head, in tiles of `rows` rows.
template <int T, class Exists>
VLM_DEVICE void load_keys(const AttentionProblem& p, int rows, int64_t b, int64_t g, int64_t j0, int64_t j1,
                          Exists exists, float* key, float* value) {
  load_tile<T>(key, rows, head_of(p.k, b, g) + j0 * p.k.row_stride, p.k.row_stride, j1 - j0, p.width, exists);
  load_tile<T>(value, rows, head_of(p.v, b, g) + j0 * p.v.row_stride, p.v.row_stride, j1 - j0, p.value_width, exists);
}

// Queries i0 .. i1 of a head and the gradients of their outputs, likewise.
template <int T>
VLM_DEVICE void load_queries(const AttentionBackward& call, int rows, int64_t b, int64_t h, int64_t i0, int64_t i1,
                             float* query, float* dout) {
  const AttentionProblem& p = call.problem;
  load_tile<T>(query, rows, head_of(p.q, b, h) + i0 * p.q.row_stride, p.q.row_stride, i1 - i0, p.width, always);
  load_tile<T>(dout, rows, head_of(call.dout, b, h) + i0 * call.dout.row_stride, call.dout.row_stride, i1 - i0,
               p.value_width, always);
}

template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    attention_keys_kernel(AttentionBackward call, const __grid_constant__ MaskProgram program, const float* delta) {
  using Shape = BackwardShape<T>;
  constexpr int R = Shape::R, C = Shape::C;
  VLM_DYN_SMEM(float, key);
  float* value = key + Shape::own * Shape::room;
  float* query = value + Shape::own * Shape::room;
  float* dout = query + Shape::other * Shape::room;
  float* weight = dout + Shape::other * Shape::room;
  typename Shape::KeyBits bits{reinterpret_cast<uint32_t*>(weight + Shape::own * Shape::weight_room), false};

  const AttentionProblem& p = call.problem;
  const KeyBlock at = key_block(p, p.key_heads, Shape::own);
  const int64_t b = at.b, g = at.h, j0 = at.j0, j1 = at.j1, group = p.query_heads / p.key_heads;
  const HeadMask keys{program, b, g};  // for the key mask alone
  const auto exists = [&](int row) { return keys.exists(j0 + row); };
  load_keys<T>(p, Shape::own, b, g, j0, j1, exists, key, value);
  bool there[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t j = j0 + thread_row() * R + r;
    there[r] = j < p.keys && keys.exists(j);
  }
  Accumulator<R, T> dk, dv;
  dk.clear();
  dv.clear();
  const bool any_key = __syncthreads_count(my_key_exists(keys, j0, p.keys, Shape::own)) > 0;

  for (int64_t h = g * group; any_key && h < (g + 1) * group; ++h) {
    const float* bias = bias_of(p, b, h);
    const int64_t first_row = (b * p.query_heads + h) * p.queries;
    const HeadMask mask{program, b, h};
    for (int64_t i0 = 0; i0 < p.queries; i0 += Shape::other) {
      const int64_t i1 = smaller(i0 + Shape::other, p.queries);
      const Cover cover = mask.cover(i0, i1, j0, j1);
      if (cover == Cover::skip) continue;
      __syncthreads();
      load_queries<T>(call, Shape::other, b, h, i0, i1, query, dout);
      bits.template fill<TILE_THREADS>(mask, cover, i0, j0);
      __syncthreads();
      float s[R][C], gradient[R][C];
      clear(s);
      clear(gradient);
      tile_dot(key, query, Shape::room, round_to_4(p.width), s);
      tile_dot(value, dout, Shape::room, round_to_4(p.value_width), gradient);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t i = i0 + thread_column() + 16 * c;
        const float lse = i < i1 ? call.lse[first_row + i] : minus_infinity();
        const float shift = i < i1 ? delta[first_row + i] : 0.0f;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool allowed = there[r] && bits.allows(thread_column() + 16 * c, thread_row() * R + r);
          s[r][c] = probability(p, allowed, bias, i, j0 + thread_row() * R + r, s[r][c], lse);
          gradient[r][c] = s[r][c] == 0.0f ? 0.0f : s[r][c] * (gradient[r][c] - shift);
        }
      }
      put_scores(weight, Shape::weight_room, s);
      __syncwarp();
      dv.add_product(weight, Shape::weight_room, dout, Shape::other);
      __syncwarp();
      put_scores(weight, Shape::weight_room, gradient);
      __syncwarp();
      dk.add_product(weight, Shape::weight_room, query, Shape::other);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t j = j0 + thread_row() * R + r;
    if (j >= p.keys) continue;
    dk.store_row(head_of(call.dk, b, g) + j * call.dk.row_stride, r, p.width, p.scale);
    dv.store_row(head_of(call.dv, b, g) + j * call.dv.row_stride, r, p.value_width, 1.0f);
  }
}

// Shared memory of a block that computes tiles of scores [own queries, other keys]: the rows of both sides, a tile of
// gradients of logits, and what the mask allows.
template <int T>
struct ScoreTiles {
  using Shape = BackwardShape<T>;
  static constexpr int R = Shape::R, C = Shape::C;
  float *query, *dout, *key, *value, *weight;
  typename Shape::QueryBits bits;

  VLM_DEVICE explicit ScoreTiles(float* room)
      : query(room),
        dout(query + Shape::own * Shape::room),
        key(dout + Shape::own * Shape::room),
        value(key + Shape::other * Shape::room),
        weight(value + Shape::other * Shape::room),
        bits{reinterpret_cast<uint32_t*>(weight + Shape::own * Shape::weight_room), false} {}

  VLM_DEVICE void put_queries(const AttentionBackward& call, int64_t b, int64_t h, int64_t i0, int64_t i1) {
    load_queries<T>(call, Shape::own, b, h, i0, i1, query, dout);
  }
  // Keys j0 .. j1 and the bits of the pairs with the queries from i0 on.
  VLM_DEVICE void put_keys(const AttentionProblem& p, const HeadMask& mask, Cover cover, int64_t i0, int64_t j0,
                           int64_t j1) {
    const auto exists = [&](int row) { return mask.exists(j0 + row); };
    load_keys<T>(p, Shape::other, mask.b, mask.h / (p.query_heads / p.key_heads), j0, j1, exists, key, value);
    bits.template fill<TILE_THREADS>(mask, cover, i0, j0);
  }
  VLM_DEVICE void logit_gradient(const AttentionBackward& call, const float* delta, const HeadMask& mask, int64_t i0,
                                 int64_t j0, float (&gradient)[R][C]) const {
    const AttentionProblem& p = call.problem;
    const float* bias = bias_of(p, mask.b, mask.h);
    float s[R][C];
    clear(s);
    clear(gradient);
    tile_dot(query, key, Shape::room, round_to_4(p.width), s);
    tile_dot(dout, value, Shape::room, round_to_4(p.value_width), gradient);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t i = i0 + thread_row() * R + r, row = (mask.b * p.query_heads + mask.h) * p.queries + i;
      const float lse = i < p.queries ? call.lse[row] : minus_infinity(), shift = i < p.queries ? delta[row] : 0.0f;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t j = j0 + thread_column() + 16 * c;
        const bool allowed =
            j < p.keys && mask.exists(j) && bits.allows(thread_row() * R + r, thread_column() + 16 * c);
        const float weight_of = probability(p, allowed, bias, i, j, s[r][c], lse);
        gradient[r][c] = weight_of == 0.0f ? 0.0f : weight_of * (gradient[r][c] - shift);
      }
    }
  }
};

template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    attention_queries_kernel(AttentionBackward call, const __grid_constant__ MaskProgram program, const float* delta) {
  using Shape = BackwardShape<T>;
  constexpr int R = Shape::R, C = Shape::C;
  VLM_DYN_SMEM(float, room);
  ScoreTiles<T> tiles(room);

  const AttentionProblem& p = call.problem;
  const QueryBlock at = query_block(p, Shape::own);
  const int64_t b = at.b, h = at.h, i0 = at.i0, i1 = at.i1;
  const HeadMask mask{program, b, h};
  tiles.put_queries(call, b, h, i0, i1);
  Accumulator<R, T> dq;
  dq.clear();
  for (int64_t j0 = 0; j0 < p.keys; j0 += Shape::other) {
    const int64_t j1 = smaller(j0 + Shape::other, p.keys);
    const Cover cover = mask.cover(i0, i1, j0, j1);
    if (cover == Cover::skip) continue;
    if (__syncthreads_count(my_key_exists(mask, j0, p.keys, Shape::other)) == 0) continue;
    tiles.put_keys(p, mask, cover, i0, j0, j1);
    __syncthreads();
    float gradient[R][C];
    tiles.logit_gradient(call, delta, mask, i0, j0, gradient);
    put_scores(tiles.weight, Shape::weight_room, gradient);
    __syncwarp();
    dq.add_product(tiles.weight, Shape::weight_room, tiles.key, Shape::other);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t i = i0 + thread_row() * R + r;
    if (i < p.queries) dq.store_row(head_of(call.dq, b, h) + i * call.dq.row_stride, r, p.width, p.scale);
  }
}

// A block owns a tile [own, other] of the bias, or all rows of `other` columns where the bias has one row.
template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    attention_bias_kernel(AttentionBackward call, const __grid_constant__ MaskProgram program, const float* delta) {
  using Shape = BackwardShape<T>;
  constexpr int R = Shape::R, C = Shape::C;
  VLM_DYN_SMEM(float, room);
  ScoreTiles<T> tiles(room);

  const AttentionProblem& p = call.problem;
  const bool one_row = call.bias_rows == 1;
  const int64_t columns = pieces(p.keys, Shape::other), rows = one_row ? 1 : pieces(p.queries, Shape::own);
  const int64_t j0 = blockIdx.x % columns * Shape::other, j1 = smaller(j0 + Shape::other, p.keys);
  const int64_t tile_row = blockIdx.x / columns % rows, member = blockIdx.x / columns / rows;
  const int64_t own_b = member / call.bias_heads, own_h = member % call.bias_heads;
  const int64_t b0 = call.bias_batch == 1 ? 0 : own_b, b1 = call.bias_batch == 1 ? p.batch : own_b + 1;
  const int64_t h0 = call.bias_heads == 1 ? 0 : own_h, h1 = call.bias_heads == 1 ? p.query_heads : own_h + 1;
  const int64_t first = one_row ? 0 : tile_row * Shape::own;
  const int64_t last = one_row ? p.queries : smaller(first + Shape::own, p.queries);

  float sum[R][C];
  clear(sum);
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t h = h0; h < h1; ++h) {
      const HeadMask mask{program, b, h};
      for (int64_t i0 = first; i0 < last; i0 += Shape::own) {
        const int64_t i1 = smaller(i0 + Shape::own, p.queries);
        const Cover cover = mask.cover(i0, i1, j0, j1);
        if (cover == Cover::skip) continue;
        __syncthreads();
        tiles.put_keys(p, mask, cover, i0, j0, j1);
        tiles.put_queries(call, b, h, i0, i1);
        __syncthreads();
        float gradient[R][C];
        tiles.logit_gradient(call, delta, mask, i0, j0, gradient);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int c = 0; c < C; ++c) sum[r][c] += gradient[r][c];
      }
    }
  }
  const float* weight = tiles.weight;
  put_scores(tiles.weight, Shape::weight_room, sum);
  __syncthreads();
  const int64_t keys = j1 - j0;
  float* to = call.dbias + member * call.bias_rows * p.keys + j0;
  if (one_row) {
    if (threadIdx.x < keys) {
      float total = 0.0f;
      for (int row = 0; row < Shape::own; ++row) total += weight[row * Shape::weight_room + threadIdx.x];
      to[threadIdx.x] = total;
    }
  } else {
    for (int at = threadIdx.x; at < Shape::own * Shape::other; at += TILE_THREADS) {
      const int row = at / Shape::other, column = at % Shape::other;
      if (first + row < last && column < keys)
        to[(first + row) * p.keys + column] = weight[row * Shape::weight_room + column];
    }
  }
}

template <int T>
void launch_attention_backward(const AttentionBackward& call, const MaskProgram& mask, float* delta, void* stream) {
  using Shape = BackwardShape<T>;
  const AttentionProblem& p = call.problem;
  if (const unsigned count = delta_blocks(p))
    VLM_LAUNCH(attention_delta_kernel, {count}, {TILE_THREADS}, 0, stream, call, delta);
  if (const unsigned count = key_blocks(p, p.key_heads, Shape::own))
    VLM_LAUNCH(attention_keys_kernel<T>, {count}, {TILE_THREADS}, Shape::shared_bytes, stream, call, mask, delta);
  if (const unsigned count = query_blocks(p, Shape::own))
    VLM_LAUNCH(attention_queries_kernel<T>, {count}, {TILE_THREADS}, Shape::shared_bytes, stream, call, mask, delta);
  if (call.dbias == nullptr) return;
  const int64_t bias_blocks = pieces(p.keys, Shape::other) * (call.bias_rows == 1 ? 1 : pieces(p.queries, Shape::own)) *
                              call.bias_batch * call.bias_heads;
  if (bias_blocks > 0)
    VLM_LAUNCH(attention_bias_kernel<T>, {blocks(bias_blocks)}, {TILE_THREADS}, Shape::shared_bytes, stream, call,
               mask, delta);
}

}  // namespace vlm::cuda
