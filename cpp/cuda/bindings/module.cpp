#include "bindings.hpp"
#include "vlm/cuda.hpp"

// The tests build the same module over the emulation, under another name and for tensors of the CPU.
#ifndef VLM_MODULE
#define VLM_MODULE _native_cuda
#define VLM_DEVICE_TYPE "cuda"
#endif

PYBIND11_MODULE(VLM_MODULE, m) {
  m.doc() = "Operators of vlm on CUDA devices: device addresses in and out.";
  m.attr("device_type") = VLM_DEVICE_TYPE;
  m.def("device_shared_bytes", &vlm::cuda::device_shared_bytes, pybind11::arg("device"),
        "Shared memory that a block may ask for.");
  vlm::cuda::register_attention(m);
  vlm::cuda::register_contrastive(m);
  vlm::cuda::register_recurrent(m);
  vlm::cuda::register_tokens(m);
  vlm::cuda::register_vocabulary(m);
}
