// Attention with a block memory behind a window, for one row, without gradients. Source: infllm.
//
// q [H, n, D], keys and values [G, T, D], none rotated; query head h reads key head h / (H / G). The queries are the last
// n of the T positions. They are read in chunks of `chunk`, the first of which begins with the first query. For a chunk
// at the positions [s, e):
//   gone = max(0, s - window + 1) tokens are in no query's window; blocks = max(0, gone - first_tokens) / block of them
//   are whole blocks behind the first tokens.
//   1. Blocks that are new get representatives: for every query head the mean of the keys of the `representatives`
//      tokens with the greatest score, of equal ones the earlier.
//   2. If blocks > topk, the topk blocks are chosen for which sum over heads of <representative, mean over the chunk of
//      the queries rotated to position window - 1> is greatest, of equal ones the earlier; else all.
//   3. out = softmax(scale q k^T) v over the keys j with 0 <= i - j < window, both rotated to their positions, and, in the
//      same softmax, those with i - j >= window among the first tokens, the chosen blocks, and what lies between the last
//      block and the window: as if at distance window - 1, or at the true one where `absolute`.
//   4. score[h][j] += sum over the queries of the weight of j in their window.
// Rotation: x1 cos - x2 sin, x2 cos + x1 sin, for the halves x1, x2 of a row.
//
// Numerics: float32. Keys of the window are rotated by their distance from its begin. Work is cut by shape alone: bits do
// not depend on the number of threads. Memory: packed keys and values of one chunk for few key heads at a time, and the
// scores of few rows for each thread.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

struct BlockMemoryForward {
  int64_t heads, key_heads, queries, keys, width;
  int64_t first_tokens, window, block, topk, representatives, chunk;
  bool absolute;
  float scale;
  Heads q, k, v;           // batch strides are not used
  Matrix cosines, sines;   // [table_rows, width / 2]: row p for position p
  int64_t table_rows;      // at least min(T, window + chunk), or T where `absolute`
  int64_t scored;          // positions before the queries that have a score: the last so many
  float* score;            // [H, scored + n] contiguous, in and out; 0 for the queries at first
  Heads means;             // [H, formed, D]
  int64_t formed;          // blocks that have representatives
  float* added;            // [H, more, D] contiguous: representatives of the blocks behind them
  int64_t more;            // blocks of the last chunk, less `formed`
  int32_t* chosen;         // [chunks, places]: the blocks of each chunk, ascending, then -1
  int64_t places;          // at least min(topk, formed + more)
  MutableHeads out;        // [H, n, D]
};

// Throws std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void block_memory_forward(const BlockMemoryForward& call, int threads);

}  // namespace vlm
