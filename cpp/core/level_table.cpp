// The kernel table of the level being compiled.
#include "attention/attention_kernels.hpp"
#include "attention/window_attention_kernels.hpp"
#include "contrastive/pair_kernels.hpp"
#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    attention_forward,     attention_backward,   softmax_pair_forward,
    softmax_pair_backward, sigmoid_pair_forward, sigmoid_pair_backward,
    window_attention_forward,
    window_attention_backward,
};

}  // namespace VLM_LEVEL
}  // namespace vlm
