// Entry of linear attention with decay on CUDA devices.
#include "cuda/linear_decay.cuh"

namespace vlm::cuda {

void linear_decay(const LinearDecay& call, void* stream) {
  require_sizes("linear decay", {call.batch, call.heads, call.length, call.width, call.value_width});
  require(call.width <= 128, "linear decay: CUDA kernels take query widths of at most 128");
  if (call.width <= 64) return launch_linear_decay<1>(call, stream);
  launch_linear_decay<2>(call, stream);
}

}  // namespace vlm::cuda
