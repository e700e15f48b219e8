// Mask atoms in the form that the kernels read, prepared once for a call by a common unit (mask_rows.cpp).
//
// Whatever can be said as a few ranges of keys for each query becomes a table of ranges: positions, prefixes, sinks,
// and ids that lie in runs (packed documents, facets, images). The rest stays with its arrays. Plain structs: they
// cross into per-level units.
#pragma once

#include <cstdint>

#include "vlm/mask.hpp"

namespace vlm {

struct MaskSpec {
  int64_t batch, heads, queries, keys;
  const MaskAtom* atoms;
  int64_t count;
  bool causal;  // one more band, of the closed form of AttentionProblem
  int64_t causal_offset;
};

// Query i may see keys in the union of `count` ranges [lo, hi), sorted, possibly empty.
struct RangeTable {
  const int32_t* ranges;  // [batch or 1, queries, count, 2]
  int64_t batch_stride;   // 0 or queries * count * 2
  int32_t count;
  bool local;
};

// See AtomKind::ids and ::spans; `causal` adds "or d >= 0". Negative span ids are already such that they equal nothing.
struct IdTable {
  const int32_t* query_ids;  // [batch or 1, queries]
  const int32_t* key_ids;    // [batch or 1, padded keys], a multiple of 16
  int64_t query_stride, key_stride;
  bool has_shared, has_open, causal;
  int32_t shared, open;
  int64_t offset;
};

struct GlobalTable {  // null = none
  const int32_t* queries;
  const int32_t* keys;  // [batch or 1, padded keys], 0 or -1
  int64_t query_stride, key_stride;
};

struct DenseTable {
  const uint8_t* allow;
  int64_t batch_stride, head_stride, row_stride;
};

// Ranges of keys of each block of queries: ranges[starts[e]] .. ranges[starts[e + 1]], for entry e.
struct BlockTable {
  const int32_t* ranges;  // pairs
  const int64_t* starts;  // [batch or 1, heads or 1, query blocks + 1]
  int64_t batch_stride, head_stride, query_block;
};

constexpr int max_range_tables = 6, max_id_tables = 4, max_dense_tables = 2, max_block_tables = 4;

struct PreparedMask {
  int range_count, id_count, dense_count, block_count;
  RangeTable ranges[max_range_tables];
  IdTable ids[max_id_tables];
  DenseTable dense[max_dense_tables];
  BlockTable blocks[max_block_tables];
  GlobalTable global;
  const int32_t* reach;  // [batch or 1, queries]: end of the keys that query i, or any before it, may see; null = all
  int64_t reach_stride;
  void* memory;
};

// Throws std::invalid_argument on atoms that do not fit, std::bad_alloc without memory.
PreparedMask prepare_mask(const MaskSpec& spec);
void release_mask(PreparedMask& mask);

}  // namespace vlm
