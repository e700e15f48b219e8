// Registration functions, one for each operator family.
//
// Arrays cross as addresses with sizes and strides (in elements), 0 for "not given": no torch headers, so the module
// does not depend on torch's ABI. The Python side checks dtype, device and layout. The GIL is released while computing.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace vlm::bindings {

template <class T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

void register_runtime(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_contrastive(pybind11::module_& m);
void register_attention_statistics(pybind11::module_& m);
void register_tokens(pybind11::module_& m);
void register_vocabulary(pybind11::module_& m);
void register_alignment(pybind11::module_& m);
void register_late_interaction(pybind11::module_& m);
void register_recurrent(pybind11::module_& m);
void register_selection(pybind11::module_& m);
void register_block_memory(pybind11::module_& m);
void register_window_attention(pybind11::module_& m);

}  // namespace vlm::bindings
