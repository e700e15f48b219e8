#include "bindings.hpp"
#include "bindings/token_calls.hpp"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

using namespace bindings;

void register_tokens(py::module_& m) {
  m.def("token_match_workspace", [](const std::array<int64_t, 4>& n) {
    TokenMatch call{};
    call.batch = n[0], call.heads = n[1], call.length = n[2], call.width = n[3];
    return token_match_workspace(call);
  }, py::arg("sizes"), "Bytes of workspace; sizes: batch, heads, length, width.");
  const auto stream = py::arg("stream");
  define_token_match<uintptr_t, uintptr_t>(m, [](const TokenMatch& call, uintptr_t room, uintptr_t on) {
    token_match(call, address<void>(room), address<void>(on));
  }, py::arg("workspace"), stream);
  define_token_select<uintptr_t>(
      m, [](const TokenSelect& call, uintptr_t on) { token_select(call, address<void>(on)); }, stream);
  define_token_gather<uintptr_t>(
      m, [](const TokenGather& call, uintptr_t on) { token_gather(call, address<void>(on)); }, stream);
  define_token_scatter<uintptr_t>(
      m, [](const TokenScatter& call, uintptr_t on) { token_scatter(call, address<void>(on)); }, stream);
  define_token_weights<uintptr_t>(
      m, [](const TokenWeights& call, uintptr_t on) { token_weights(call, address<void>(on)); }, stream);
}

}  // namespace vlm::cuda
