#include "token_calls.hpp"

namespace vlm::bindings {

void register_tokens(py::module_& m) {
  define_token_match<int>(m, [](const TokenMatch& call, int threads) { token_match(call, threads); },
                          py::arg("threads"));
  define_token_select<int>(m, [](const TokenSelect& call, int threads) { token_select(call, threads); },
                           py::arg("threads"));
  define_token_gather<int>(m, [](const TokenGather& call, int threads) { token_gather(call, threads); },
                           py::arg("threads"));
  define_token_scatter<int>(m, [](const TokenScatter& call, int threads) { token_scatter(call, threads); },
                            py::arg("threads"));
  define_token_weights<int>(m, [](const TokenWeights& call, int) { token_weights(call); }, py::arg("threads"));
}

}  // namespace vlm::bindings
