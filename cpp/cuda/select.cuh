// The best entries of each row, as ascending indices: a block for each row, radix selection over ordered 32-bit keys.
//
// Four passes of 8 bits find the key of the last chosen entry and how many of its equals are chosen (the first ones);
// then a scan over the row writes the chosen indices in order. Integer counts alone are added atomically.
#pragma once

#include "cuda/checks.hpp"
#include "cuda/tile.cuh"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

// Larger scores have larger keys; NaN counts as -inf, -0 as 0.
VLM_DEVICE uint32_t ordered_key(float score) {
  if (!(score == score)) score = minus_infinity();
  union {
    float number;
    uint32_t bits;
  } value{score == 0.0f ? 0.0f : score};
  return value.bits & 0x80000000u ? ~value.bits : value.bits | 0x80000000u;
}

// How many threads of the block before this one have `flag`; `total` of all. `room` holds one number for each warp.
VLM_DEVICE int block_rank(bool flag, int* room, int& total) {
  const unsigned votes = __ballot_sync(all_lanes, flag), below = (1u << (threadIdx.x % 32)) - 1;
  const int warp = threadIdx.x / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[warp] = population(votes);
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < TILE_THREADS / 32; ++w) {
    before += w < warp ? room[w] : 0;
    total += room[w];
  }
  return before + population(votes & below);
}

constexpr std::size_t SELECT_SHARED = sizeof(int) * (256 + TILE_THREADS / 32 + 2);

__global__ void __launch_bounds__(TILE_THREADS) token_select_kernel(TokenSelect call) {
  VLM_DYN_SMEM(int, counts);  // of the keys with each value of the current byte
  int* room = counts + 256;
  int* found = room + TILE_THREADS / 32;  // the byte chosen, and how many are still wanted below it
  const int64_t row = blockIdx.x;
  const int tid = threadIdx.x;
  const float* scores = call.scores + row * call.length;
  const auto valid = [&](int64_t n) { return call.valid == nullptr || call.valid[row * call.length + n] != 0; };
  const auto always_in = [&](int64_t n) {
    return call.always != nullptr && call.always[row * call.length + n] != 0 && valid(n);
  };
  const auto candidate = [&](int64_t n) { return n < call.length && valid(n) && !always_in(n); };

  int mine = 0;
  for (int64_t n = tid; n < call.length; n += TILE_THREADS) mine += candidate(n);
  if (tid == 0) found[1] = 0;
  __syncthreads();
  atomicAdd(found + 1, mine);
  __syncthreads();
  const int candidates = found[1];
  int wanted = int(smaller(call.counts[row], int64_t(candidates)));
  wanted = wanted < 0 ? 0 : wanted;

  uint32_t prefix = 0;
  int equals = wanted;  // of the entries with the last key, those still wanted
  for (int shift = 24; shift >= 0 && wanted > 0; shift -= 8) {
    counts[tid] = 0;
    __syncthreads();
    for (int64_t n = tid; n < call.length; n += TILE_THREADS) {
      if (!candidate(n)) continue;
      const uint32_t key = ordered_key(scores[n]);
      if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(counts + (key >> shift & 255), 1);
    }
    __syncthreads();
    if (tid == 0) {
      int byte = 255, left = equals;
      while (counts[byte] < left) left -= counts[byte--];
      found[0] = byte;
      found[1] = left;
    }
    __syncthreads();
    prefix |= uint32_t(found[0]) << shift;
    equals = found[1];
  }

  int64_t* index = call.index + row * call.length;
  int64_t written = 0, equal_seen = 0;
  for (int64_t n0 = 0; n0 < call.length; n0 += TILE_THREADS) {
    const int64_t n = n0 + tid;
    const bool is_candidate = wanted > 0 && candidate(n);
    const uint32_t key = is_candidate ? ordered_key(scores[n]) : 0;
    int equal_total, total;
    const bool equal = is_candidate && key == prefix;
    const int64_t equal_rank = equal_seen + block_rank(equal, room, equal_total);
    const bool better = is_candidate && key > prefix, kept = n < call.length && always_in(n);
    const bool chosen = kept || better || (equal && equal_rank < equals);
    const int rank = block_rank(chosen, room, total);
    if (chosen) index[written + rank] = n;
    written += total;
    equal_seen += equal_total;
  }
  for (int64_t n = written + tid; n < call.length; n += TILE_THREADS) index[n] = -1;
  if (tid == 0) call.found[row] = written;
}

}  // namespace vlm::cuda
