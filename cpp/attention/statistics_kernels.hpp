// What the units of attention statistics and of the merge offer to the kernel table of one level.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void attention_column_sums(const AttentionColumnSums& call, int threads);
void attention_row_statistics(const AttentionRowStatistics& call, int threads);
void attention_rows(const AttentionRows& call, int threads);
void attention_merge(const AttentionMerge& call, int threads);
void attention_merge_backward(const AttentionMergeBackward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
