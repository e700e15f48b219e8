// Entry of the block memory: checks, then calls the active level.
#include "vlm/block_memory.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

// Whole blocks of which no query from position `start` on has a token in its window.
int64_t blocks_before(const BlockMemoryForward& c, int64_t start) {
  const int64_t gone = std::max<int64_t>(0, start - c.window + 1);
  return std::max<int64_t>(0, gone - c.first_tokens) / c.block;
}

// The same call with numbers whose sums and products stay within int64.
BlockMemoryForward within_reach(BlockMemoryForward c) {
  c.window = std::min(c.window, c.keys + 1);
  c.first_tokens = std::min(c.first_tokens, c.keys);
  c.block = std::min(c.block, c.keys + 1);
  c.representatives = std::min(c.representatives, c.block);
  c.chunk = std::min(c.chunk, std::max<int64_t>(c.queries, 1));
  return c;
}

}  // namespace

void block_memory_forward(const BlockMemoryForward& call, int threads) {
  for (int64_t n : {call.heads, call.key_heads, call.queries, call.keys, call.width, call.first_tokens, call.topk,
                    call.table_rows, call.scored, call.formed, call.more, call.places})
    require(n >= 0, "block_memory: negative size");
  require(call.key_heads > 0 && call.heads % call.key_heads == 0,
          "block_memory: query heads are not a multiple of key heads");
  require(call.width % 2 == 0, "block_memory: an odd width has no halves to rotate");
  require(call.window >= 1 && call.block >= 1 && call.representatives >= 1 && call.chunk >= 1,
          "block_memory: window, block, representatives and chunk must be at least 1");
  require(call.chunk <= call.window, "block_memory: a chunk must fit in the window");
  require(call.keys <= INT32_MAX, "block_memory: over 2^31 positions");
  require(call.queries <= call.keys && call.scored <= call.keys - call.queries,
          "block_memory: queries and scores are of positions that are there");
  BlockMemoryForward c = within_reach(call);
  const int64_t start = c.keys - c.queries, scored_from = start - c.scored;
  const int64_t last = c.queries == 0 ? start : start + (c.queries - 1) / c.chunk * c.chunk;
  require(c.formed <= blocks_before(c, start), "block_memory: blocks that have not left the window");
  require(scored_from <= std::max<int64_t>(0, start - c.window + 1) &&
              scored_from <= c.first_tokens + c.formed * c.block,
          "block_memory: the scores begin too late");
  if (c.queries == 0) return;
  const int64_t blocks = blocks_before(c, last);
  require(c.more == blocks - c.formed, "block_memory: another number of new blocks");
  require(c.places >= std::min(c.topk, blocks), "block_memory: the lists have too few places");
  require(c.table_rows >= (c.absolute ? c.keys : std::min(c.keys, c.window + c.chunk)),
          "block_memory: the table of angles is too short");
  c.topk = std::min(c.topk, blocks);
  active_kernels().block_memory_forward(c, std::max(threads, 1));
}

}  // namespace vlm
