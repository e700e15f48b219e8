// What the selection units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void select_hierarchical(const HierarchicalSelection& call, int threads);
void block_sparse_forward(const BlockSparseForward& call, int threads);
void block_memory_forward(const BlockMemoryForward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
