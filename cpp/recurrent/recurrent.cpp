// Entry of the recurrent mixers: checks, then calls the active level.
#include "vlm/recurrent.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(const SsmProblem& p) {
  for (int64_t n : {p.batch, p.length, p.channels, p.states})
    if (n < 0) throw std::invalid_argument("ssm_scan: negative size");
  for (int64_t i = 0; i < p.channels * p.states; ++i)
    if (!(p.rate[i] <= 0.0f)) throw std::invalid_argument("ssm_scan: rate must not be above 0");
}

}  // namespace

void ssm_forward(const SsmForward& call, int threads) {
  check(call.problem);
  active_kernels().ssm_forward(call, std::max(threads, 1));
}

void ssm_backward(const SsmBackward& call, int threads) {
  check(call.problem);
  active_kernels().ssm_backward(call, std::max(threads, 1));
}

void linear_scan(const LinearScan& call, int threads) {
  for (int64_t n : {call.batch, call.heads, call.length, call.width, call.value_width})
    if (n < 0) throw std::invalid_argument("linear_scan: negative size");
  if (call.chunk < 1 || call.chunk > 256) throw std::invalid_argument("linear_scan: chunk must be 1 to 256");
  if (call.boundaries != nullptr && call.boundary_every < 1)
    throw std::invalid_argument("linear_scan: boundary_every must be at least 1");
  for (int64_t h = 0; h < call.heads; ++h)
    if (!(call.log_decay[h] <= 0.0f)) throw std::invalid_argument("linear_scan: log_decay must not be above 0");
  active_kernels().linear_scan(call, std::max(threads, 1));
}

}  // namespace vlm
