// Mask atoms: what an attention mask is made of. A mask is the AND of its atoms, except that `global` opens the local
// ones: allow = (all other atoms) and (all local atoms or query i is global or key j is global).
//
// The position of query i is i + offset, that of key j is j; distance d = i + offset - j. Each atom carries its offset
// (keys - queries for bottom-right alignment, 0 for top-left). Arrays have the strides given, in elements; a stride of
// 0 shares one array among all batches or heads. Their last axis is contiguous.
#pragma once

#include <cstdint>

namespace vlm {

enum class AtomKind : int32_t {
  band = 0,          // n = {offset, below, above}: -above <= d <= below
  local_band = 1,    // the same; opened by `global`
  block_causal = 2,  // n = {offset, size}: (i + offset) / size >= j / size
  prefix = 3,        // n = {offset}; a int32 [batch]: j < a[b] or d >= 0
  lambda = 4,        // n = {offset, window, sinks}: 0 <= d < window or (j < sinks and d >= 0); local
  spans = 5,         // n = {offset}; a int32 [batch, queries], b int32 [batch, keys]: d >= 0 or a[i] == b[j] >= 0
  ids = 6,           // n = {has_shared, shared, has_open, open}; a, b as above: a[i] == b[j], or b[j] == shared, or
                     // a[i] == open
  rows = 7,          // a int32 [batch, queries, 2]: a[i][0] <= j < a[i][1]
  global = 8,        // a int32 [batch, queries], b int32 [batch, keys]: nonzero; see above. At most one
  dense = 9,         // a uint8 [batch, heads, queries, keys]: nonzero
  blocks = 10,       // n = {query_block, key_block, slots, query_blocks}; a int32 [batch, heads, query_blocks, slots],
                     // b int32 [batch, heads, query_blocks]: key block j / key_block is among the first b[..] entries
                     // of a[.., i / query_block, :]; local
};

// What a mask leaves of a tile of pairs.
enum class Cover : uint8_t { skip = 0, partial = 1, full = 2 };

struct MaskAtom {
  AtomKind kind;
  int64_t n[4];
  const void* a;
  int64_t a_batch, a_head, a_row;
  const void* b;
  int64_t b_batch, b_head;
};

}  // namespace vlm
