// The entries of attention on the tensors of a case, under emulation.
#pragma once

#include "../attention_case.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

namespace vlm::test {

inline void run_attention(AttentionTensors& t) {
  t.forget();
  std::vector<uint8_t> covers(cuda::attention_forward_workspace(t.problem()), 77);
  cuda::attention_forward(t.forward(), covers.data(), nullptr);
  std::vector<float> workspace(cuda::attention_backward_workspace(t.problem()) / 4 + 1, NAN);
  cuda::attention_backward(t.backward(), workspace.data(), nullptr);
  covers.assign(covers.size(), 77);
  cuda::attention_column_sums({t.problem(), t.lse.data(), t.dlse.data(), t.sums.data()}, covers.data(),
                              nullptr);  // any weights will do
}

struct AttentionOracle : AttentionAnswer {
  std::vector<double> sums;
};

inline AttentionOracle oracle(const AttentionTensors& t) {
  AttentionOracle o{attention_oracle(t.backward()), {}};
  // Column sums are the gradient of a bias of one row where lse alone has a gradient: that of the weights.
  AttentionBackward call = t.backward();
  const std::vector<float> zeros(t.dout.size(), 0.0f);
  call.dout = AttentionTensors::plain<Heads>(zeros, t.c.query_heads, t.c.queries, t.c.value_width);
  float wanted;
  call.dbias = &wanted;
  call.bias_batch = t.c.batch, call.bias_heads = t.c.query_heads, call.bias_rows = 1;
  o.sums = attention_oracle(call).dbias;
  return o;
}

inline bool close(const AttentionTensors& t, const AttentionOracle& o) {
  return close_to(t, o) && error_between(t.sums, o.sums) <= 5e-6;
}

}  // namespace vlm::test
