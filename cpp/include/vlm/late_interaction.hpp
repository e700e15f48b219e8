// Token-wise late interaction (FILIP, MaxSim): no [B, C, T, U] tensor of token scores ever exists.
//
// R samples of tokens v [R, T, E] meet C samples of tokens w [C, U, E]; s_ijab = <v_ia, w_jb>. Only kept tokens count.
//   row_values[i, j]    = sum over kept a of (max over kept b of s_ijab), divided by the kept a of i if `mean`;
//   column_values[i, j] = sum over kept b of (max over kept a of s_ijab), divided by the kept b of j if `mean`.
// A pair of which one side keeps no token has the values 0 and gives no gradient. Removed tokens are never read. A kept
// token that is not finite makes all values of its sample NaN.
//
// Backward: the gradient of a maximum goes to its first maximiser, as which a product with a token that is not finite
// counts; and where such a token is not finite, no gradient of a kept token of the other side is. The maximisers are what
// the forward found, or, where it was not told to keep them, computed again for a block of row samples at a time. Then dv
// is summed row sample by row sample and dw column sample by column sample: no atomics.
// Numerics: float32 products and sums. The work is cut by shape and masks alone, so the bits of the result do not
// depend on the number of threads.
// Extra memory: one packed copy of v; in a backward that is not given what was found, a packed copy of a block of v and
// about 4 MiB of maximisers.
#pragma once

#include <cstdint>

namespace vlm {

struct TokenSet {  // [samples, tokens, width], strides in elements, last axis contiguous
  const float* data;
  int64_t samples, tokens;
  int64_t sample_stride, token_stride;
  const uint8_t* mask;  // [samples, tokens], not 0 = kept; null = all kept
};

struct LateProblem {
  TokenSet rows, columns;
  int64_t width;
  bool mean;
};

struct LateForward {
  LateProblem problem;
  float* row_values;     // [R, C]
  float* column_values;  // [R, C]
  uint16_t* found;       // [R C (T + U)]: where the maxima were, for the backward; null = not kept
};

struct LateBackward {
  LateProblem problem;
  const float* row_gradient;     // [R, C], null = zeros
  const float* column_gradient;  // [R, C], null = zeros
  const uint16_t* found;         // of the forward, or null
  float* drows;                  // [R, T, E] contiguous, null if not wanted
  float* dcolumns;               // [C, U, E] contiguous, null if not wanted
};

// Both throw std::invalid_argument on negative sizes or over 65535 tokens a sample, std::bad_alloc without memory.
void late_forward(const LateForward& call, int threads);
void late_backward(const LateBackward& call, int threads);

}  // namespace vlm
