// Linear attention with decay in chunks of 64 positions: a block owns one head and 64 value columns, its state stays in
// shared memory. Only powers of the decay with exponents >= 0 occur.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

// T: steps of 64 query/key columns, which are the rows of the state.
template <int T>
struct DecayShape {
  static constexpr int chunk = LINEAR_CHUNK, room = row_room<T>, narrow = row_room<1>;
  static constexpr std::size_t shared_bytes = sizeof(float) * (2 * chunk * room + 2 * chunk * narrow + 64 * T * narrow);
};

VLM_DEVICE float decay_power(float log_decay, int64_t exponent) {
  return exponent == 0 ? 1.0f : expf(log_decay * float(exponent));  // also where the decay is 0
}

// The own rows of the state, e = 64 t + 4 ty + r and columns 4 tx + n: += sum over s of factor(s) k[s, e] v[s, column].
template <int T, class Factor>
VLM_DEVICE void update_state(float* state, const float* key, const float* value, int count, float shrink,
                             Factor factor) {
  constexpr int R = 4;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    float sum[R][4];
    clear(sum);
#pragma unroll 2
    for (int s = 0; s < count; ++s) {
      const float4 k = load4(key + s * row_room<T> + 64 * t + R * thread_row());
      const float4 v = load4(value + s * row_room<1> + 4 * thread_column());
      const float weight = factor(s), left[R] = {k.x * weight, k.y * weight, k.z * weight, k.w * weight};
#pragma unroll
      for (int r = 0; r < R; ++r) {
        sum[r][0] = fmaf(left[r], v.x, sum[r][0]);
        sum[r][1] = fmaf(left[r], v.y, sum[r][1]);
        sum[r][2] = fmaf(left[r], v.z, sum[r][2]);
        sum[r][3] = fmaf(left[r], v.w, sum[r][3]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float& own = state[(64 * t + R * thread_row() + r) * row_room<1> + 4 * thread_column() + n];
        own = fmaf(own, shrink, sum[r][n]);
      }
  }
}

template <int T>
__global__ void __launch_bounds__(TILE_THREADS, 1) linear_decay_kernel(LinearScan call) {
  using Shape = DecayShape<T>;
  constexpr int R = 4, C = 4;
  VLM_DYN_SMEM(float, query);
  float* key = query + Shape::chunk * Shape::room;
  float* value = key + Shape::chunk * Shape::room;
  float* weight = value + Shape::chunk * Shape::narrow;
  float* state = weight + Shape::chunk * Shape::narrow;

  const int64_t slices = pieces(call.value_width, 64), head = blockIdx.x / slices;
  const int64_t b = head / call.heads, h = head % call.heads, e0 = blockIdx.x % slices * 64;
  const int64_t breadth = smaller(call.value_width - e0, int64_t(64)), chunks = pieces(call.length, Shape::chunk);
  const float log_decay = call.log_decay[h];
  const int64_t cell = call.width * call.value_width, state_at = (b * call.heads + h) * cell + e0;
  const auto head_at = [&](const Heads& t) { return t.data + b * t.batch_stride + h * t.head_stride; };

  for (int at = threadIdx.x; at < 64 * T * 64; at += TILE_THREADS) {
    const int row = at / 64, column = at % 64;
    const bool there = call.state != nullptr && row < call.width && column < breadth;
    state[row * Shape::narrow + column] = there ? call.state[state_at + row * call.value_width + column] : 0.0f;
  }
  const auto put_state = [&](float* to) {
    for (int at = threadIdx.x; at < 64 * T * 64; at += TILE_THREADS) {
      const int row = at / 64, column = at % 64;
      if (row < call.width && column < breadth)
        to[row * call.value_width + column] = state[row * Shape::narrow + column];
    }
  };
  // The state at the border of a chunk, where it is wanted.
  const auto put_boundary = [&](int64_t number) {
    if (call.boundaries == nullptr || number % call.boundary_every != 0) return;
    const int64_t spans = pieces(chunks, call.boundary_every);
    put_state(call.boundaries + ((b * call.heads + h) * spans + number / call.boundary_every) * cell + e0);
  };
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t number = call.reverse ? chunks - 1 - step : step, t0 = number * Shape::chunk;
    const int64_t n = smaller(call.length - t0, int64_t(Shape::chunk));
    __syncthreads();
    load_tile<T>(query, Shape::chunk, head_at(call.q) + t0 * call.q.row_stride, call.q.row_stride, n, call.width,
                 always);
    load_tile<T>(key, Shape::chunk, head_at(call.k) + t0 * call.k.row_stride, call.k.row_stride, n, call.width, always);
    load_tile<1>(value, Shape::chunk, head_at(call.v) + t0 * call.v.row_stride + e0, call.v.row_stride, n, breadth,
                 always);
    __syncthreads();
    if (!call.reverse)
      put_boundary(number);
    else if (step > 0)
      put_boundary(number + 1);

    float s[R][C];
    clear(s);
    const int width = int((call.width + 3) / 4 * 4);
    tile_dot(query, key, Shape::room, width, s);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int64_t row = thread_row() * R + r, column = thread_column() + 16 * c;
        const int64_t distance = call.reverse ? column - row : row - column;
        s[r][c] = distance < 0 ? 0.0f : s[r][c] * decay_power(log_decay, distance);
      }
    put_scores(weight, Shape::narrow, s);
    __syncwarp();
    Accumulator<R, 1> inside, before;
    inside.clear();
    before.clear();
    inside.add_product(weight, Shape::narrow, value, Shape::chunk);
    before.add_product(query, Shape::room, state, width);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = thread_row() * R + r;
      if (row >= n) continue;
      const float power = decay_power(log_decay, call.reverse ? n - 1 - row : row + 1);
#pragma unroll
      for (int m = 0; m < 4; ++m) inside.at[r][0][m] = fmaf(before.at[r][0][m], power, inside.at[r][0][m]);
      float* out =
          call.out.data + b * call.out.batch_stride + h * call.out.head_stride + (t0 + row) * call.out.row_stride;
      inside.store_row(out + e0, r, breadth, 1.0f);
    }
    __syncthreads();  // everybody has read the state
    update_state<T>(state, key, value, int(n), decay_power(log_decay, n), [&](int at) {
      return decay_power(log_decay, call.reverse ? int64_t(at) + 1 : n - 1 - at);
    });
  }
  __syncthreads();
  if (call.reverse && chunks > 0) put_boundary(0);
  if (call.final_state != nullptr) put_state(call.final_state + state_at);
}

template <int T>
void launch_linear_decay(const LinearScan& call, void* stream) {
  const int64_t count = call.batch * call.heads * pieces(call.value_width, 64);
  if (count > 0)
    VLM_LAUNCH(linear_decay_kernel<T>, {blocks(count)}, {TILE_THREADS}, DecayShape<T>::shared_bytes, stream, call);
}

}  // namespace vlm::cuda
