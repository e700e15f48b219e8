// Declarations of the per-level kernels of this family.
#pragma once

#include "vlm/float_products.hpp"
#include "vlm/vocabulary.hpp"

namespace vlm {
namespace VLM_LEVEL {

void cross_entropy_rows(const CrossEntropyRows& call, int threads);
void divergence_rows(const DivergenceRows& call, int threads);
void float_product_rows(const FloatProduct& call, int threads);
void float_product_gradients(const FloatProductGradients& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
