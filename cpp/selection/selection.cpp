// Entry of selection: checks, then calls the active level.
#include "vlm/selection.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(const SelectionProblem& p) {
  for (int64_t n : {p.batch, p.query_heads, p.key_heads, p.queries, p.keys, p.width})
    if (n < 0) throw std::invalid_argument("selection: negative size");
  if (p.key_heads == 0 || p.query_heads % p.key_heads != 0)
    throw std::invalid_argument("selection: query heads are not a multiple of key heads");
  if (p.block_q < 1 || p.block_k < 1 || p.block_q > 256 || p.block_k > 256)
    throw std::invalid_argument("selection: blocks must be 1 to 256 positions");
  if (p.queries > INT32_MAX || p.keys > INT32_MAX) throw std::invalid_argument("selection: over 2^31 queries or keys");
}

constexpr int64_t far = int64_t{1} << 32;  // beyond every position

int64_t blocks_of(int64_t positions, int64_t block) { return (positions + block - 1) / block; }

// The same selection with numbers whose sums stay within int64.
HierarchicalSelection within_reach(HierarchicalSelection c) {
  SelectionProblem& p = c.problem;
  p.offset = std::clamp(p.offset, -far, far);
  c.budget = std::min(c.budget, blocks_of(p.keys, p.block_k));
  c.window = std::min(c.window, 4 * far);
  c.sinks = std::min(c.sinks, p.keys);
  c.row_step = std::min(c.row_step, p.block_q);
  return c;
}

}  // namespace

void select_hierarchical(const HierarchicalSelection& call, int threads) {
  check(call.problem);
  if (call.budget < 0 || call.window < 0 || call.sinks < 0 || call.row_step < 1)
    throw std::invalid_argument("select_hierarchical: budget, window, sinks must be at least 0, row_step at least 1");
  if (call.representative != Representative::first && call.representative != Representative::center)
    throw std::invalid_argument("select_hierarchical: unknown representative");
  const HierarchicalSelection c = within_reach(call);
  const SelectionProblem& p = c.problem;
  const int64_t always = blocks_of(c.sinks, p.block_k) + blocks_of(c.window + p.block_q, p.block_k) + 1;
  if (c.capacity < std::min(blocks_of(p.keys, p.block_k), always + c.budget))
    throw std::invalid_argument("select_hierarchical: the lists have too few places");
  active_kernels().select_hierarchical(c, std::max(threads, 1));
}

void block_sparse_forward(const BlockSparseForward& call, int threads) {
  check(call.problem);
  if (call.value_width < 0 || call.capacity < 0) throw std::invalid_argument("block_sparse: negative size");
  BlockSparseForward c = call;
  c.problem.offset = std::clamp(c.problem.offset, -far, far);
  const SelectionProblem& p = c.problem;
  const int64_t lists = p.batch * p.query_heads * blocks_of(p.queries, p.block_q);
  const int64_t blocks = blocks_of(p.keys, p.block_k);
  for (int64_t list = 0; list < lists; ++list) {
    if (call.counts[list] < 0 || call.counts[list] > call.capacity)
      throw std::invalid_argument("block_sparse: a count is outside of its list");
    for (int64_t i = 0; i < call.counts[list]; ++i) {
      const int32_t block = call.indices[list * call.capacity + i];
      if (block < 0 || block >= blocks || (i > 0 && block <= call.indices[list * call.capacity + i - 1]))
        throw std::invalid_argument("block_sparse: a list must hold ascending block numbers");
    }
  }
  active_kernels().block_sparse_forward(c, std::max(threads, 1));
}

}  // namespace vlm
