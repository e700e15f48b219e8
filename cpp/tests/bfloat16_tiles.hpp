// What test_bfloat16 asks of the per-level tile product.
#pragma once

#include <cstdint>

namespace vlm::test {

enum class PairLayout { rows, tile_rows, tile_columns };

// c [M, ldc] = a b / 2 of one packed product at level avx512_bf16. a: `rows` bfloat16 [M, K]; `tile_rows` float32 [M, K]
// and `tile_columns` float32 [K, M], K or M at most 256, both rounded on the way. b [N, K] (transposed) or [K, N]
// bfloat16; rows of b where `keep` is 0 count as zeros.
void tile_product(PairLayout layout, bool transposed, int64_t M, int64_t N, int64_t K, const void* a, const uint16_t* b,
                  const uint8_t* keep, float* c, int64_t ldc);

}  // namespace vlm::test
