// Recurrent mixers: linear attention with decay, and the selective state-space scan.
//
// Both keep float32 states and never hold a matrix over all pairs of positions. Two arguments are shared:
//   keep [B, N]: 0 = the position does not exist: it is never read into a sum, its output and gradients are 0, and it
//     neither decays nor changes the state. Null = all exist.
//   run [B, N]: number of the packed document, not decreasing; a position sees those of its run only. A position that
//     does not exist has the run of the one before it. The state that comes in belongs to the first run of the row,
//     the one that goes out is the last run's. Null = one run.
//
// Bits do not depend on the number of threads: work is cut by shape alone.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

// Linear attention with decay: with a = exp(log_decay[h]) and the state S [D, E] of each batch and head
//   S_t = a S_{t-1} + k_t v_t^T,   out_t = q_t S_t,      S_{-1} = state, final_state = S_{N-1}.
// In chunks of c positions: out = ((Q K^T) * M) V + diag(a^(r+1)) Q S with M_rs = a^(r-s) for s <= r, r local in the
// chunk, and S <- a^c S + (diag(a^(c-1-r)) K)^T V. Only powers with exponents >= 0 occur.
//
// reverse: positions are visited from the last to the first, and the state decays after it was read:
//   out_t = q_t (S + k_t v_t^T), S <- a (S + k_t v_t^T). So the three gradients are scans as well:
//   dq = scan(dout, v, k, state^T), dk = reverse scan(v, dout, q, dfinal^T), dv = reverse scan(k, q, dout, dfinal),
//   and the last one's final state is the gradient of `state`.
//
// chunk 1 is the recurrence itself. boundaries: the state before position i * boundary_every * chunk (reverse: after
// that position was visited), for the gradient of the decay.
// Memory for each thread: O(c (D + E) + D E).
struct LinearScan {
  int64_t batch, heads, length, width, value_width;
  Heads q, k, v;           // [B, H, N, D], [B, H, N, D], [B, H, N, E]
  const float* log_decay;  // [H], <= 0; -inf: no memory
  const float* state;      // [B, H, D, E] contiguous, or null for 0
  const uint8_t* keep;     // [B, N] contiguous or null
  const int32_t* run;      // [B, N] contiguous or null
  bool reverse;
  int64_t chunk;           // 1 to 256
  MutableHeads out;        // [B, H, N, E]
  float* final_state;      // [B, H, D, E] contiguous, or null if not wanted
  float* boundaries;       // [B, H, ceil(N / (chunk * boundary_every)), D, E] contiguous, or null
  int64_t boundary_every;  // in chunks
};

// Throws std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void linear_scan(const LinearScan& call, int threads);

// Selective state-space scan: with step = softplus(delta) (one number for each position and channel c) and the state
// h [C, S] of each batch
//   h_t[c, s] = exp(step rate[c, s]) h_{t-1}[c, s] + step x_t[c] b_t[s],
//   out_t[c] = sum_s h_t[c, s] c_t[s] + skip[c] x_t[c].
// Channels are vector lanes; time is walked in chunks of SSM_CHUNK, whose first states are kept for the backward pass,
// which computes the others again.
constexpr int64_t SSM_CHUNK = 64;

struct Rows {  // [batch, length, width], the last axis contiguous
  const float* data;
  int64_t batch_stride, row_stride;
};

struct SsmProblem {
  int64_t batch, length, channels, states;
  Rows x, delta;         // [B, N, C]
  const float* rate;     // [C, S] contiguous, <= 0
  Rows b, c;             // [B, N, S]
  const float* skip;     // [C]
  const float* state;    // [B, C, S] contiguous, or null for 0
  const uint8_t* keep;   // [B, N] contiguous or null
  const int32_t* run;    // [B, N] contiguous or null
};

struct SsmForward {
  SsmProblem problem;
  float* out;            // [B, N, C] contiguous
  float* final_state;    // [B, C, S] contiguous
  float* boundaries;     // [B, ceil(N / SSM_CHUNK), C, S] contiguous: states before each chunk
};

struct SsmBackward {
  SsmProblem problem;
  const float* boundaries;
  Rows dout;                                     // [B, N, C]
  const float* dfinal;                           // [B, C, S] contiguous
  float *dx, *ddelta, *drate, *db, *dc, *dskip;  // contiguous, of the shapes of their inputs
  float* dstate;                                 // [B, C, S]
};

void ssm_forward(const SsmForward& call, int threads);
void ssm_backward(const SsmBackward& call, int threads);

}  // namespace vlm
