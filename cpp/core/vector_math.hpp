// Vector exponentials and logarithms, relative error about 1e-7. Per-level code.
#pragma once

#include "core/simd.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr float log2_e = 1.44269504088896340736f;
constexpr float ln_2 = 0.69314718055994530942f;

// 2^x for x <= 127; 0 below -126 (so 2^-inf = 0, no denormals); NaN stays NaN.
VLM_INLINE vf exp2(vf x) {
  const vf magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it leaves round(x) + 127 in the low bits
  const vf lowest = splat(-126.0f);
  const vi flushed = x < lowest;
  const vf clamped = select(flushed, lowest, x);
  const vf shifted = clamped + magic;
  const vf r = clamped - (shifted - magic);  // in [-1/2, 1/2]
  vf p = splat(1.535336188e-4f);  // minimax polynomial of 2^r (Cephes exp2f), degree 6
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
  // A product, not a sum of exponents as integers: that would make a number of some NaNs.
  return select(flushed, vf{}, p * as_float(as_int(shifted) << 23));
}

// e^x for x <= 88.
VLM_INLINE vf exp(vf x) { return exp2(x * log2_e); }

// log(1 + e) for e in [0, 1], relative error: 2 atanh(t) with t = e / (2 + e) <= 1/3.
VLM_INLINE vf log1p_unit(vf e) {
  const vf t = e / (e + 2.0f);
  const vf u = t * t;
  vf p = splat(2.0f / 17);
  p = p * u + 2.0f / 15;
  p = p * u + 2.0f / 13;
  p = p * u + 2.0f / 11;
  p = p * u + 2.0f / 9;
  p = p * u + 2.0f / 7;
  p = p * u + 2.0f / 5;
  p = p * u + 2.0f / 3;
  p = p * u + 2.0f;
  return t * p;
}

// tanh x, relative error a few units in the last place: a rational function of degree 13 / 6, constant beyond 7.9.
VLM_INLINE vf tanh(vf x) {
  const vf limit = splat(7.90531110763549805f);
  x = select(x > limit, limit, select(x < -limit, -limit, x));
  const vf u = x * x;
  vf p = splat(-2.76076847742355e-16f);
  p = p * u + 2.00018790482477e-13f;
  p = p * u + -8.60467152213735e-11f;
  p = p * u + 5.12229709037114e-08f;
  p = p * u + 1.48572235717979e-05f;
  p = p * u + 6.37261928875436e-04f;
  p = p * u + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * u + 1.18534705686654e-04f;
  q = q * u + 2.26843463243900e-03f;
  q = q * u + 4.89352518554385e-03f;
  return x * p / q;
}

}  // namespace VLM_LEVEL
}  // namespace vlm
