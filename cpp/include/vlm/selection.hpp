// Selection of key blocks for long contexts, and exact attention over the blocks selected.
//
// q [B, Hq, N, D], k [B, Hk, M, D], v [B, Hk, M, V]; query head h reads key head h / (Hq / Hk). Query i has position
// i + offset and sees keys j <= i + offset. Queries are cut into blocks of block_q rows, keys into blocks of block_k.
//
// Block lists: indices [B, Hq, query blocks, capacity] ascending, without duplicates, and counts [B, Hq, query blocks];
// places behind the count hold -1.
//
// Numerics: float32. Work is cut by shape alone: bits do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "vlm/view.hpp"

namespace vlm {

enum class Representative : int { first = 0, center = 1 };

struct SelectionProblem {
  int64_t batch, query_heads, key_heads, queries, keys, width;
  Heads q, k;
  int64_t offset, block_q, block_k;
};

// Hierarchical search. Kept always: the blocks that hold the first `sinks` keys, and those that hold the keys from
// `window` - 1 before the first query of the block up to its last (the last block counts as whole). Of the n blocks
// between, `budget` are chosen (all if n <= budget): n blocks are cut into `budget` intervals; each interval longer than
// one is halved, the halves are scored by their representative block (greatest <q, k> over the rows of the query block,
// one in row_step, and the keys that they see), and the best `budget` stay, of equal ones the earlier; until all have
// length 1. A half with the representative of its whole takes over its score.
struct HierarchicalSelection {
  SelectionProblem problem;
  int64_t budget, window, sinks, row_step, capacity;
  Representative representative;
  int32_t* indices;
  int32_t* counts;
  int64_t* evaluations;  // [B, Hq, query blocks]: representative blocks judged; known scores are not computed again
};

// Softmax over the keys of the listed blocks that a query sees. A row without any: output 0, lse -inf.
struct BlockSparseForward {
  SelectionProblem problem;
  Heads v;
  int64_t value_width, capacity;
  float scale;
  const int32_t* indices;
  const int32_t* counts;
  MutableHeads out;
  float* lse;  // [B, Hq, N] contiguous
};

// Both throw std::invalid_argument on sizes that do not fit and std::bad_alloc without memory. threads >= 1.
void select_hierarchical(const HierarchicalSelection& call, int threads);
void block_sparse_forward(const BlockSparseForward& call, int threads);

}  // namespace vlm
