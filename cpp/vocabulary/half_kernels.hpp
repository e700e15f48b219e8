// Declarations of the bfloat16 products of this family.
#pragma once

#include "vlm/half_products.hpp"

namespace vlm {
namespace VLM_LEVEL {

void product_rows(const HalfProduct& call, int threads);
void product_gradients(const HalfProductGradients& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
