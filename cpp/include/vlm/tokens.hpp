// Token reduction: match similar tokens, choose the best, move and merge rows.
//
//   match    metric [B, N, D] or, as the mean over heads, [B, H, N, D]. Even tokens are sources, odd ones destinations.
//            For every source the destination of the largest cosine; the `merged` sources of the largest cosines are
//            merged into theirs. Tokens before `protect` are neither merged nor merged into. Equal values: the lowest
//            index. A NaN cosine counts as -inf.
//            source, target [B, merged] (source by falling cosine), kept [B, N - merged] in the order asked for, assign
//            [B, N] = place in `kept` where a token ends up.
//            merged <= floor((N - protect) / 2).
//   select   the `counts[b]` best of the candidate scores [B, N] and every protected entry, as ascending indices padded
//            with -1; equal scores: the lowest index; NaN counts as -inf. An entry that is not valid is never chosen.
//   gather   to[b, k] = weight[b, k] * from[b, index[b, k]]; index -1 gives a row of zeros. Without weights any type.
//   scatter  to[b, k] = sum of weight[b, n] * from[b, n] over the n with index[b, n] = k, by rising n; index -1 and
//            weight 0 are left out without being read. Gather and scatter are each other's adjoint.
//   weights  of a merge: s_n / sum of s over the slot (size), 1 / members (mean); a slot of total size 0 takes the
//            mean.
//
// Numerics: float32; sizes are summed in double. Every output has one writer: bits do not depend on the number of
// threads.
#pragma once

#include <cstdint>

namespace vlm {

enum class MatchOrder : int32_t {
  sources_first = 0,  // kept sources by index, then destinations by index
  position = 1,       // all by index
  similarity = 2,     // kept sources by falling cosine, then destinations by index
};

struct TokenMatch {
  int64_t batch, heads, length, width;
  const float* metric;
  int64_t batch_stride, head_stride, row_stride;  // last axis contiguous
  int64_t merged, protect;
  MatchOrder order;
  int64_t *source, *target, *kept, *assign;  // contiguous
};

struct TokenSelect {
  int64_t batch, length;
  const float* scores;            // [batch, length], contiguous
  const int64_t* counts;          // [batch]
  const uint8_t *valid, *always;  // [batch, length], contiguous, or null: all valid, none protected
  int64_t* index;                 // [batch, length], contiguous: ascending, then -1
  int64_t* found;                 // [batch]
};

struct TokenGather {
  int64_t batch, from_length, length, width;
  const void* from;
  int64_t batch_stride, row_stride;  // in elements
  int64_t element_bytes;             // 4 where weights are given
  const int64_t* index;              // [batch, length], contiguous
  const float* weights;              // the same, or null
  void* to;                          // [batch, length, width], contiguous
};

struct TokenScatter {
  int64_t batch, from_length, length, width;
  const float* from;
  int64_t batch_stride, row_stride;
  const int64_t* index;  // [batch, from_length], contiguous, values in -1 .. length - 1
  const float* weights;  // the same, or null
  float* to;             // [batch, length, width], contiguous
};

struct TokenWeights {
  int64_t batch, length, slots;
  const int64_t* assign;  // [batch, length], contiguous, values in 0 .. slots - 1
  const float* sizes;     // the same, or null = all 1
  bool by_size;
  float *weights;         // [batch, length]
  float *slot_sizes;      // [batch, slots]
};

// All throw std::invalid_argument on sizes or indices that do not fit and std::bad_alloc without memory. threads >= 1.
void token_match(const TokenMatch& call, int threads);
void token_select(const TokenSelect& call, int threads);
void token_gather(const TokenGather& call, int threads);
void token_scatter(const TokenScatter& call, int threads);
void token_weights(const TokenWeights& call);

}  // namespace vlm
