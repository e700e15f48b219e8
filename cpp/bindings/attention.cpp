#include "attention_calls.hpp"

namespace vlm::bindings {

void register_attention(py::module_& m) {
  define_attention_forward<int>(m, &attention_forward, "Exact attention; see vlm/attention.hpp.", py::arg("threads"));
  define_attention_backward<int>(m, &attention_backward, "Gradients of exact attention.", py::arg("threads"));
}

}  // namespace vlm::bindings
