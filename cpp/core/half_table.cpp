// The kernels of the level that multiplies bfloat16.
#include "attention/attention_kernels.hpp"
#include "contrastive/pair_kernels.hpp"
#include "core/half_table.hpp"
#include "vocabulary/half_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {

extern const HalfKernels half_kernels;
const HalfKernels half_kernels = {
    attention_forward,
    attention_backward,
    softmax_pair_forward,
    softmax_pair_backward,
    sigmoid_pair_forward,
    sigmoid_pair_backward,
    product_rows,
    product_gradients,
};

}  // namespace VLM_LEVEL
}  // namespace vlm
