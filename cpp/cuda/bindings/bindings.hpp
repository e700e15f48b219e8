// Registration functions of the module vlm._native_cuda: device addresses with sizes and strides (in elements), 0 for
// "not given", and at the end the workspace, where a call wants one, and the stream. The Python side checks dtype, device
// and layout. The GIL is released while kernels are launched.
#pragma once

#include <pybind11/pybind11.h>

namespace vlm::cuda {

void register_attention(pybind11::module_& m);
void register_contrastive(pybind11::module_& m);
void register_recurrent(pybind11::module_& m);
void register_tokens(pybind11::module_& m);
void register_vocabulary(pybind11::module_& m);

}  // namespace vlm::cuda
