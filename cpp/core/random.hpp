// Counter-based random bits: a hash of the counters, so that any pass can recreate them. Per-level code.
//
// mix is the finaliser of MurmurHash3 (32 bits). The key of a row is mix(mix(mix(mix(low ^ mix(high + K)) + b K) + h K)
// + i K) with K = 0x9E3779B1 and the two halves of the seed; the bits of pair (i, j) are mix(key + j K).
#pragma once

#include "core/simd.hpp"

namespace vlm {
namespace VLM_LEVEL {

typedef uint32_t vu __attribute__((vector_size(VLM_VECTOR_BYTES)));

constexpr uint32_t golden = 0x9E3779B1u;

template <class T>
VLM_INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

VLM_INLINE uint32_t head_key(uint64_t seed, int64_t b, int64_t h) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const uint32_t key = mix(low ^ mix(high + golden));
  return mix(mix(key + static_cast<uint32_t>(b) * golden) + static_cast<uint32_t>(h) * golden);
}
VLM_INLINE uint32_t row_key(uint32_t head, int64_t i) { return mix(head + static_cast<uint32_t>(i) * golden); }

// Lanes of all ones where pair (i, j0 + lane) is kept.
VLM_INLINE vi kept_lanes(uint32_t row, int64_t j0, uint32_t drop_below) {
  const vu lanes = (vu)lane_numbers() + static_cast<uint32_t>(j0);
  const vu bits = mix(lanes * golden + row);
  return (vi)(bits >= drop_below);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
