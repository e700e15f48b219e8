// Compiled with the instructions of avx512_bf16: no templates of the standard library here, see core/simd.hpp.
#include "bfloat16_tiles.hpp"

#include "core/tile_bf16.hpp"

namespace vlm::test {

using namespace vlm::VLM_LEVEL;

void tile_product(PairLayout layout, bool transposed, int64_t M, int64_t N, int64_t K, const void* a, const uint16_t* b,
                  const uint8_t* keep, float* c, int64_t ldc) {
  const int64_t words = pairs(K), panel = NR * words;
  Scratch left(packed_rows_room(M, words) + (M + K + 2) * LDS), right(panels_room(N, words));
  if (transposed)
    pack_pairs_transposed(b, K, N, K, keep, right.data);
  else
    pack_pairs_plain(b, N, K, N, keep, right.data, panel);
  const float* tile = static_cast<const float*>(a);
  if (layout == PairLayout::rows) {
    pack_pair_rows(static_cast<const uint16_t*>(a), K, M, K, left.data);
    multiply_pairs<PairRows>(M, N, words, left.data, MR * words, right.data, panel, c, ldc, 0.5f, false);
  } else if (layout == PairLayout::tile_rows) {
    for (int64_t m = 0; m < M; ++m) round_row(tile + m * K, K, left.data + m * (LDS / 2));
    multiply_pairs<PairTileRows>(M, N, words, left.data, MR * (LDS / 2), right.data, panel, c, ldc, 0.5f, false);
  } else {
    for (int64_t k = 0; k < K; k += 2)
      round_two_rows(tile + k * M, k + 1 < K ? tile + (k + 1) * M : nullptr, M, left.data + k / 2 * LDS);
    multiply_pairs<PairTileColumns>(M, N, words, left.data, MR, right.data, panel, c, ldc, 0.5f, false);
  }
}

}  // namespace vlm::test
