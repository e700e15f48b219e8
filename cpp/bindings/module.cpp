#include "bindings.hpp"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native operators of vlm: raw strided views in and out.";
  vlm::bindings::register_runtime(m);
  vlm::bindings::register_attention(m);
  vlm::bindings::register_contrastive(m);
  vlm::bindings::register_window_attention(m);
}
