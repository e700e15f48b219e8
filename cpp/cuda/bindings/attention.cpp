#include "bindings.hpp"
#include "bindings/attention_calls.hpp"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

using namespace bindings;

namespace {

AttentionProblem sizes_alone(const Sizes& sizes, const Extras& extras) {
  return attention_problem(sizes, {}, {}, {}, 1.0f, false, 0, 0, 0, {}, extras);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_shared_bytes", [](const Sizes& sizes) {
    return attention_shared_bytes(sizes_alone(sizes, Extras({})));
  }, py::arg("sizes"), "Shared memory that a block asks for; see vlm/cuda.hpp.");
  m.def("attention_workspace", [](const Sizes& sizes, const std::vector<Atom>& atoms) {
    Extras extras({});
    extras.atoms = mask_atoms(atoms);
    const AttentionProblem p = sizes_alone(sizes, extras);
    return std::pair(attention_forward_workspace(p), attention_backward_workspace(p));
  }, py::arg("sizes"), py::arg("atoms"), "Bytes of workspace of the forward and of the backward pass.");
  const auto workspace = py::arg("workspace");
  const auto stream = py::arg("stream");
  define_attention_forward<uintptr_t, uintptr_t>(
      m, [](const AttentionForward& call, uintptr_t room, uintptr_t on) {
        attention_forward(call, address<void>(room), address<void>(on));
      }, "Exact attention; see vlm/cuda.hpp.", workspace, stream);
  define_attention_backward<uintptr_t, uintptr_t>(
      m, [](const AttentionBackward& call, uintptr_t room, uintptr_t on) {
        attention_backward(call, address<void>(room), address<void>(on));
      }, "Gradients of exact attention.", workspace, stream);
  define_attention_column_sums<uintptr_t, uintptr_t>(
      m, [](const AttentionColumnSums& call, uintptr_t room, uintptr_t on) {
        attention_column_sums(call, address<void>(room), address<void>(on));
      }, "Weighted column sums of the attention matrix.", workspace, stream);
}

}  // namespace vlm::cuda
