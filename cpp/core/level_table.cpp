// The kernel table of the level being compiled.
#include "attention/attention_kernels.hpp"
#include "contrastive/pair_kernels.hpp"
#include "core/kernel_table.hpp"
#include "recurrent/recurrent_kernels.hpp"
#include "selection/selection_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    attention_forward,     attention_backward,   softmax_pair_forward,
    softmax_pair_backward, sigmoid_pair_forward, sigmoid_pair_backward,
    linear_scan,
    ssm_forward,
    ssm_backward,
    select_hierarchical,
    block_sparse_forward,
};

}  // namespace VLM_LEVEL
}  // namespace vlm
