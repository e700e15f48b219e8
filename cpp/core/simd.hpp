// Vectors of the level being compiled. Included by per-level translation units only.
//
// Rule for everything included by those units: all functions live in namespace vlm::VLM_LEVEL, and no template of the
// standard library is instantiated. Otherwise the linker may keep the AVX-512 copy of a shared inline function, and an
// older CPU stops with an illegal instruction.
#pragma once

#include <cstdint>

#ifndef VLM_LEVEL
#error "simd.hpp is for per-level translation units: VLM_LEVEL and VLM_VECTOR_BYTES must be defined"
#endif

#define VLM_INLINE static inline __attribute__((always_inline))
#define VLM_INLINE_MEMBER inline __attribute__((always_inline))

namespace vlm {
namespace VLM_LEVEL {

typedef float vf __attribute__((vector_size(VLM_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VLM_VECTOR_BYTES)));

constexpr int W = VLM_VECTOR_BYTES / 4;  // floats in a vector

VLM_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
VLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

VLM_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
VLM_INLINE vi load(const int32_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
VLM_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof(v)); }

// First `count` lanes from memory, the others 0; reads nothing beyond.
VLM_INLINE vf load_first(const float* p, int64_t count) {
  if (count >= W) return load(p);
  float lanes[W] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = p[l];
  return load(lanes);
}
VLM_INLINE void store_first(float* p, vf v, int64_t count) {
  if (count >= W) {
    store(p, v);
    return;
  }
  for (int l = 0; l < W; ++l)
    if (l < count) p[l] = v[l];
}

// Ask for the cache line of base[offset]; the address may lie outside of any array, it is not read.
VLM_INLINE void fetch_soon(const float* base, int64_t offset) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset) * sizeof(float);
  __builtin_prefetch(reinterpret_cast<const void*>(at));
}

VLM_INLINE vf splat(float x) { return x - vf{}; }
VLM_INLINE vi splat_int(int32_t x) { return x - vi{}; }
VLM_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
VLM_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
VLM_INLINE vf as_float(vi v) { return (vf)v; }
VLM_INLINE vi as_int(vf v) { return (vi)v; }

VLM_INLINE vi lane_numbers() {
  vi v{};
  for (int l = 0; l < W; ++l) v[l] = l;
  return v;
}

constexpr float infinity = __builtin_inff();

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Indices<I...>;
};

// ---- reductions over the lanes of one vector, always in the same order: halves, quarters, ...

template <int Step, int... I>
VLM_INLINE vf exchange(vf v, Indices<I...>) {  // lane l gets the value of lane l ^ Step
  return __builtin_shufflevector(v, v, (I ^ Step)...);
}
VLM_INLINE float sum_lanes(vf v) {
  using All = typename CountTo<W>::type;
  if constexpr (W > 8) v += exchange<8>(v, All{});
  if constexpr (W > 4) v += exchange<4>(v, All{});
  v += exchange<2>(v, All{});
  v += exchange<1>(v, All{});
  return v[0];
}
VLM_INLINE float max_lanes(vf v) {
  using All = typename CountTo<W>::type;
  if constexpr (W > 8) v = maximum(v, exchange<8>(v, All{}));
  if constexpr (W > 4) v = maximum(v, exchange<4>(v, All{}));
  v = maximum(v, exchange<2>(v, All{}));
  v = maximum(v, exchange<1>(v, All{}));
  return v[0];
}

// Whether a number among the first `count` is NaN; reads nothing beyond. `maximum` passes over NaN or not, as the lanes
// fall, so a row whose largest number is -inf may still hold one.
VLM_INLINE bool any_nan(const float* p, int64_t count) {
  vi found{};
  for (int64_t c = 0; c < count; c += W) {
    const vf v = load_first(p + c, count - c);
    found |= v != v;
  }
  int32_t any = 0;
  for (int l = 0; l < W; ++l) any |= found[l];
  return any != 0;
}
constexpr float not_a_number = __builtin_nanf("");

// ---- transposition of a W x W block in registers: log2(W) rounds of pairwise block swaps

template <int Step, int... I>
VLM_INLINE void swap_blocks(vf& a, vf& b, Indices<I...>) {
  const vf low = __builtin_shufflevector(a, b, ((I & Step) == 0 ? I : I - Step + W)...);
  const vf high = __builtin_shufflevector(a, b, ((I & Step) == 0 ? I + Step : I + W)...);
  a = low;
  b = high;
}

template <int Step>
VLM_INLINE void transpose_round(vf (&rows)[W]) {
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r)
    if ((r & Step) == 0) swap_blocks<Step>(rows[r], rows[r + Step], typename CountTo<W>::type{});
}

VLM_INLINE void transpose(vf (&rows)[W]) {
  if constexpr (W > 8) transpose_round<W / 2>(rows);
  if constexpr (W > 4) transpose_round<4>(rows);
  transpose_round<2>(rows);
  transpose_round<1>(rows);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
