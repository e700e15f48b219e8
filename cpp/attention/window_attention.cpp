// Entry of windowed attention: checks, then calls the active level.
#include "vlm/window_attention.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(const WindowAttentionProblem& p) {
  for (int64_t n : {p.batch, p.rows, p.columns, p.heads, p.width})
    if (n < 0) throw std::invalid_argument("window attention: negative size");
  if (p.window_rows < 1 || p.window_columns < 1)
    throw std::invalid_argument("window attention: a window has at least one position");
  if (p.window_rows > 4096 || p.window_columns > 4096)
    throw std::invalid_argument("window attention: window larger than 4096");
  if (p.shift_rows < 0 || p.shift_rows >= p.window_rows || p.shift_columns < 0 || p.shift_columns >= p.window_columns)
    throw std::invalid_argument("window attention: expected 0 <= shift < window");
}

}  // namespace

void window_attention_forward(const WindowAttentionForward& call, int threads) {
  check(call.problem);
  active_kernels().window_attention_forward(call, std::max(threads, 1));
}

void window_attention_backward(const WindowAttentionBackward& call, int threads) {
  check(call.problem);
  active_kernels().window_attention_backward(call, std::max(threads, 1));
}

}  // namespace vlm
