// The kernel table of the level being compiled.
#include "alignment/alignment_kernels.hpp"
#include "attention/attention_kernels.hpp"
#include "contrastive/pair_kernels.hpp"
#include "core/kernel_table.hpp"
#include "vocabulary/vocabulary_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    attention_forward,     attention_backward,   softmax_pair_forward,
    softmax_pair_backward, sigmoid_pair_forward, sigmoid_pair_backward,
    cross_entropy_rows,
    divergence_rows,
    alignment_forward,
    alignment_backward,
};

}  // namespace VLM_LEVEL
}  // namespace vlm
