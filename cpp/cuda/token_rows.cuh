// Rows of tokens moved and summed, a warp for each row (or each slot) of the result: every output has one writer, and
// members are added by rising index.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

constexpr int SCATTER_STEPS = 8, SCATTER_COLUMNS = 32 * SCATTER_STEPS;

template <int bytes>
struct ElementOf;
template <>
struct ElementOf<1> {
  using Type = uint8_t;
};
template <>
struct ElementOf<2> {
  using Type = uint16_t;
};
template <>
struct ElementOf<4> {
  using Type = float;
};
template <>
struct ElementOf<8> {
  using Type = uint64_t;
};

template <int bytes>
__global__ void __launch_bounds__(TILE_THREADS) token_gather_kernel(TokenGather call) {
  using Element = typename ElementOf<bytes>::Type;
  const int64_t at = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (at >= call.batch * call.length) return;
  const int64_t index = call.index[at], row = at / call.length * call.batch_stride + index * call.row_stride;
  const float weight = bytes != 4 || call.weights == nullptr ? 1.0f : call.weights[at];
  const Element* from = static_cast<const Element*>(call.from) + row;
  Element* to = static_cast<Element*>(call.to) + at * call.width;
  const bool nothing = index < 0 || weight == 0.0f;
  for (int64_t e = threadIdx.x % 32; e < call.width; e += 32) {
    Element value = nothing ? Element(0) : from[e];
    if (bytes == 4 && weight != 1.0f) value = nothing ? Element(0) : Element(value * weight);
    to[e] = value;
  }
}

// visit(n) for each n with index[n] == slot, by rising n; the same in all lanes.
template <class Visit>
VLM_DEVICE void for_members(const int64_t* index, int64_t count, int64_t slot, Visit visit) {
  for (int64_t n0 = 0; n0 < count; n0 += 32) {
    const int64_t n = n0 + threadIdx.x % 32;
    unsigned members = __ballot_sync(all_lanes, n < count && index[n] == slot);
    for (int lane = 0; members != 0; ++lane, members >>= 1)
      if (members & 1u) visit(n0 + lane);
  }
}

__global__ void __launch_bounds__(TILE_THREADS) token_scatter_kernel(TokenScatter call) {
  const int64_t strips = pieces(call.width, SCATTER_COLUMNS);
  const int64_t task = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (task >= call.batch * call.length * strips) return;
  const int64_t at = task / strips, b = at / call.length, e0 = task % strips * SCATTER_COLUMNS + threadIdx.x % 32;
  float sum[SCATTER_STEPS] = {};
  for_members(call.index + b * call.from_length, call.from_length, at % call.length, [&](int64_t n) {
    const float weight = call.weights == nullptr ? 1.0f : call.weights[b * call.from_length + n];
    if (weight == 0.0f) return;
    const float* from = call.from + b * call.batch_stride + n * call.row_stride;
#pragma unroll
    for (int s = 0; s < SCATTER_STEPS; ++s)
      if (e0 + 32 * s < call.width) sum[s] = fmaf(from[e0 + 32 * s], weight, sum[s]);
  });
  float* to = call.to + at * call.width;
#pragma unroll
  for (int s = 0; s < SCATTER_STEPS; ++s)
    if (e0 + 32 * s < call.width) to[e0 + 32 * s] = sum[s];
}

__global__ void __launch_bounds__(TILE_THREADS) token_weight_kernel(TokenWeights call) {
  const int64_t task = int64_t(blockIdx.x) * (TILE_THREADS / 32) + threadIdx.x / 32;
  if (task >= call.batch * call.slots) return;
  const int64_t b = task / call.slots, slot = task % call.slots;
  const int64_t* assign = call.assign + b * call.length;
  const auto size = [&](int64_t n) { return call.sizes == nullptr ? 1.0 : double(call.sizes[b * call.length + n]); };
  double total = 0.0;
  int64_t count = 0;
  for_members(assign, call.length, slot, [&](int64_t n) {
    total += size(n);
    ++count;
  });
  for_members(assign, call.length, slot, [&](int64_t n) {
    const double weight = call.by_size && total > 0.0 ? size(n) / total : 1.0 / double(count);
    if (n % 32 == threadIdx.x % 32) call.weights[b * call.length + n] = float(weight);
  });
  if (threadIdx.x % 32 == 0) call.slot_sizes[task] = float(total);
}

}  // namespace vlm::cuda
