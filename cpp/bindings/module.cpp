#include "bindings.hpp"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native operators of vlm: raw strided views in and out.";
  vlm::bindings::register_runtime(m);
  vlm::bindings::register_attention(m);
  vlm::bindings::register_contrastive(m);
  vlm::bindings::register_attention_statistics(m);
  vlm::bindings::register_tokens(m);
  vlm::bindings::register_vocabulary(m);
  vlm::bindings::register_alignment(m);
  vlm::bindings::register_late_interaction(m);
  vlm::bindings::register_recurrent(m);
  vlm::bindings::register_selection(m);
  vlm::bindings::register_block_memory(m);
  vlm::bindings::register_window_attention(m);
}
