// Entry of the bfloat16 products: checks, then calls the level that has them.
#include <algorithm>
#include <stdexcept>

#include "core/half_table.hpp"

namespace vlm {
namespace {

const HalfKernels& kernels_for(int64_t rows, int64_t ids, int64_t width) {
  if (rows < 0 || ids < 0 || width < 0) throw std::invalid_argument("bfloat16 product: negative size");
  const HalfKernels* half = active_half_kernels();
  if (half == nullptr) throw std::invalid_argument("bfloat16 product: the level in force does not multiply bfloat16");
  return *half;
}

}  // namespace

void product_rows(const HalfProduct& call, int threads) {
  kernels_for(call.rows, call.ids, call.width).product_rows(call, std::max(threads, 1));
}

void product_gradients(const HalfProductGradients& call, int threads) {
  kernels_for(call.rows, call.ids, call.width).product_gradients(call, std::max(threads, 1));
}

}  // namespace vlm
