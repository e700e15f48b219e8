// Entry of token selection on CUDA devices.
#include "cuda/select.cuh"

namespace vlm::cuda {

void token_select(const TokenSelect& call, void* stream) {
  require_sizes("token select", {call.batch, call.length});
  require(call.length <= INT32_MAX, "token select: over 2^31 entries in a row");
  if (call.batch > 0)
    VLM_LAUNCH(token_select_kernel, {blocks(call.batch)}, {TILE_THREADS}, SELECT_SHARED, stream, call);
}

}  // namespace vlm::cuda
