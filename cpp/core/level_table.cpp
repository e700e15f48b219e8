// The kernel table of the level being compiled.
#include "alignment/alignment_kernels.hpp"
#include "attention/attention_kernels.hpp"
#include "attention/statistics_kernels.hpp"
#include "contrastive/late_kernels.hpp"
#include "attention/window_attention_kernels.hpp"
#include "contrastive/pair_kernels.hpp"
#include "core/kernel_table.hpp"
#include "tokens/token_kernels.hpp"
#include "vocabulary/vocabulary_kernels.hpp"
#include "recurrent/recurrent_kernels.hpp"
#include "selection/selection_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    attention_forward,     attention_backward,   softmax_pair_forward,
    softmax_pair_backward, sigmoid_pair_forward, sigmoid_pair_backward,
    attention_column_sums, attention_row_statistics, attention_rows,
    attention_merge, attention_merge_backward,
    token_partners, token_gather, token_scatter,
    cross_entropy_rows,
    divergence_rows,
    alignment_forward,
    alignment_backward,
    late_forward,
    late_backward,
    linear_scan,
    ssm_forward,
    ssm_backward,
    select_hierarchical,
    block_sparse_forward,
    block_memory_forward,
    window_attention_forward,
    window_attention_backward,
    float_product_rows,
    float_product_gradients,
};

}  // namespace VLM_LEVEL
}  // namespace vlm
