// Entry of linear attention with decay on CUDA devices.
#include "cuda/linear_decay.cuh"

namespace vlm::cuda {

int64_t linear_scan_shared_bytes(int64_t width) {
  require(width <= 128, "linear decay: CUDA kernels take query widths of at most 128");
  return width <= 64 ? DecayShape<1>::shared_bytes : DecayShape<2>::shared_bytes;
}

void linear_scan(const LinearScan& call, void* stream) {
  require_sizes("linear decay", {call.batch, call.heads, call.length, call.width, call.value_width});
  require(call.width <= 128, "linear decay: CUDA kernels take query widths of at most 128");
  require(call.chunk == LINEAR_CHUNK, "linear decay: CUDA kernels take chunks of 64 positions");
  require(call.keep == nullptr && call.run == nullptr, "linear decay: CUDA kernels take neither padding nor documents");
  require(call.boundaries == nullptr || call.boundary_every >= 1, "linear decay: boundary_every must be at least 1");
  if (call.width <= 64) return launch_linear_decay<1>(call, stream);
  launch_linear_decay<2>(call, stream);
}

}  // namespace vlm::cuda
