// The tensor core instructions of sm_80 on the CPU, by the register layouts of the PTX manual.
#pragma once

#include "cuda/emulation/fibers.hpp"

namespace vlm::cuda {

inline float float_of_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Two floats rounded to nearest even; `low` takes the low half.
inline uint32_t pack_bf16(float low, float high) {
  const auto round = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint32_t(0x7fff);  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}

// c += a b with a 16 x 16 (rows) and b 16 x 8 (columns), bf16; mma.sync.m16n8k16.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], VLM_SITE) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulation::exchange(~0u, mine, "mma", file, line);
  const auto half = [](uint32_t pair, int k) { return float_of_bf16(uint16_t(k & 1 ? pair >> 16 : pair)); };
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < 4; ++n) {
    const int row = lane / 4 + (n >= 2 ? 8 : 0), column = 2 * (lane % 4) + (n & 1);
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int inside = k % 8 / 2;
      const auto left = emulation::shown_by<Operands>(row % 8 * 4 + inside);
      const auto right = emulation::shown_by<Operands>(column * 4 + inside);
      sum += half(left.a[(k >= 8 ? 2 : 0) + (row >= 8 ? 1 : 0)], k) * half(right.b[k >= 8 ? 1 : 0], k);
    }
    c[n] += sum;
  }
}

// Four 8 x 8 matrices of 16-bit values; lanes 8 m .. 8 m + 7 point to the rows of matrix m, 16 bytes each.
template <bool transposed>
void load_matrices(uint32_t (&to)[4], const void* row, VLM_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: misaligned row");
  emulation::exchange(~0u, row, "ldmatrix", file, line);
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    uint32_t halves[2];
    for (int n = 0; n < 2; ++n) {
      const int r = transposed ? 2 * (lane % 4) + n : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + n;
      halves[n] = static_cast<const uint16_t*>(emulation::shown_by<const void*>(8 * m + r))[c];
    }
    to[m] = halves[0] | halves[1] << 16;
  }
}

}  // namespace vlm::cuda
