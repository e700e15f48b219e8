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
}

}  // namespace

void select_hierarchical(const HierarchicalSelection& call, int threads) {
  check(call.problem);
  const SelectionProblem& p = call.problem;
  if (call.budget < 0 || call.window < 0 || call.sinks < 0 || call.row_step < 1)
    throw std::invalid_argument("select_hierarchical: budget, window, sinks must be at least 0, row_step at least 1");
  const int64_t blocks = (p.keys + p.block_k - 1) / p.block_k;
  const int64_t always = (call.sinks + p.block_k - 1) / p.block_k + (call.window + p.block_q - 1) / p.block_k + 2;
  if (call.capacity < std::min(blocks, always + call.budget))
    throw std::invalid_argument("select_hierarchical: the lists have too few places");
  active_kernels().select_hierarchical(call, std::max(threads, 1));
}

void block_sparse_forward(const BlockSparseForward& call, int threads) {
  check(call.problem);
  const SelectionProblem& p = call.problem;
  const int64_t lists = p.batch * p.query_heads * ((p.queries + p.block_q - 1) / p.block_q);
  const int64_t blocks = (p.keys + p.block_k - 1) / p.block_k;
  for (int64_t list = 0; list < lists; ++list) {
    if (call.counts[list] < 0 || call.counts[list] > call.capacity)
      throw std::invalid_argument("block_sparse: a count is outside of its list");
    for (int64_t i = 0; i < call.counts[list]; ++i) {
      const int32_t block = call.indices[list * call.capacity + i];
      if (block < 0 || block >= blocks || (i > 0 && block <= call.indices[list * call.capacity + i - 1]))
        throw std::invalid_argument("block_sparse: a list must hold ascending block numbers");
    }
  }
  active_kernels().block_sparse_forward(call, std::max(threads, 1));
}

}  // namespace vlm
