// Entry of the float32 products: checks, then calls the active level.
#include <algorithm>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {
namespace {

void check(int64_t rows, int64_t ids, int64_t width) {
  if (rows < 0 || ids < 0 || width < 0) throw std::invalid_argument("product: negative size");
}

}  // namespace

void product_rows(const FloatProduct& call, int threads) {
  check(call.rows, call.ids, call.width);
  active_kernels().float_product_rows(call, std::max(threads, 1));
}

void product_gradients(const FloatProductGradients& call, int threads) {
  check(call.rows, call.ids, call.width);
  active_kernels().float_product_gradients(call, std::max(threads, 1));
}

}  // namespace vlm
