// Products of float32 matrices for the vocabulary losses. Compiled once per level.
//
// Both walk over tiles of BC ids, whose rows of `weight` are packed once and meet all rows of `hidden`.
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "vocabulary/partial_sums.hpp"
#include "vocabulary/vocabulary_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t PARTS = 8, PART_TILES = 8;  // partial sums of dh: at most so many, each of at least so many tiles
constexpr int64_t PIECE = 128;
constexpr int64_t BLOCK = 256;  // rows that meet a tile at once: their panels stay in the cache

// C [M, N] (+)= A B where C has no room beyond N. Sums of PIECE products are made by themselves and then added: chains
// of thousands of additions would lose more than a library's product does.
template <class A>
void multiply_in_pieces(int64_t M, int64_t N, int64_t K, const float* a, int64_t group_stride, const float* b,
                        int64_t panel_stride, float* c, int64_t ldc, bool accumulate) {
  alignas(64) float piece[MR * NR];
  for (int64_t m = 0; m < M; m += MR, a += group_stride) {
    const int64_t rows = smaller(MR, M - m);
    const RegisterTile wide = register_tile_for<A, NV>(rows), narrow = register_tile_for<A, 1>(rows);
    const float* panel = b;
    for (int64_t n = 0; n < N; n += NR, panel += panel_stride) {
      const int64_t columns = smaller(NR, N - n);
      const RegisterTile tile = columns > W ? wide : narrow;
      float* to = c + m * ldc + n;
      int64_t k = 0;
      do {
        const bool added = accumulate || k > 0;
        const int64_t count = smaller(PIECE, K - k);
        const bool direct = !added && columns % W == 0;
        tile(count, a + k * A::k_step, panel + k * NR, direct ? to : piece, direct ? ldc : NR, false);
        for (int64_t r = 0; !direct && r < rows; ++r)
          for (int64_t e = 0; e < columns; e += W) {
            const vf sum = load(piece + r * NR + e);
            float* at = to + r * ldc + e;
            store_first(at, added ? load_first(at, columns - e) + sum : sum, columns - e);
          }
        k += count;
      } while (k < K);
    }
  }
}

struct GradientPlan {
  const FloatProductGradients& call;
  int64_t tiles, parts, part_tiles, stride;
  bool want_hidden, want_weight;

  explicit GradientPlan(const FloatProductGradients& c)
      : call(c),
        tiles((c.ids + BC - 1) / BC),
        stride(round_up(larger(c.width, 1), W)),
        want_hidden(c.d_hidden.data != nullptr),
        want_weight(c.d_weight.data != nullptr) {
    part_tiles = larger(PART_TILES, (tiles + PARTS - 1) / PARTS);
    parts = (tiles + part_tiles - 1) / part_tiles;
  }
  int64_t hidden_room() const { return want_weight ? call.rows * round_up(call.width, NR) : 0; }
  int64_t part_room() const { return want_hidden ? call.rows * stride : 0; }
  // Of a worker: a block of g at the stride of a score tile, the tile of `weight` as panels.
  int64_t block_room() const { return BLOCK * LDS; }
  int64_t weight_room() const { return want_hidden ? BC * round_up(call.width, NR) : 0; }
  int64_t worker_room() const { return block_room() + weight_room(); }
};

void gradient_tile(const GradientPlan& s, int64_t tile, const float* hidden, float* part, bool first_of_part,
                   float* work) {
  const FloatProductGradients& c = s.call;
  const int64_t first = tile * BC, n = smaller(BC, c.ids - first);
  float *block = work, *weight = block + s.block_room();
  if (s.want_hidden)
    pack_plain(c.weight.data + first * c.weight.row_stride, c.weight.row_stride, n, c.width, nullptr, weight, NR * BC);
  for (int64_t i0 = 0; i0 < c.rows; i0 += BLOCK) {
    const int64_t height = smaller(BLOCK, c.rows - i0);
    for (int64_t i = 0; i < height; ++i)
      __builtin_memcpy(block + i * LDS, c.gradient.data + (i0 + i) * c.gradient.row_stride + first, n * sizeof(float));
    if (s.want_weight)
      multiply_in_pieces<TileColumns>(n, c.width, height, block, MR, hidden + i0 * NR, NR * c.rows,
                                      c.d_weight.data + first * c.d_weight.row_stride, c.d_weight.row_stride, true);
    if (s.want_hidden)
      multiply_in_pieces<TileRows>(height, c.width, n, block, MR * LDS, weight, NR * BC, part + i0 * s.stride, s.stride,
                                   !first_of_part);
  }
}

}  // namespace

void float_product_rows(const FloatProduct& call, int threads) {
  const int64_t K = call.width, tiles = (call.ids + BC - 1) / BC;
  Scratch hidden(packed_rows_room(call.rows, K) + NR);
  parallel_for((call.rows + MR - 1) / MR, 8, threads, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * MR, last = smaller(end * MR, call.rows);
    pack_rows(call.hidden.data + first * call.hidden.row_stride, call.hidden.row_stride, last - first, K, 1.0f,
              hidden.data + first * K);
  });
  const int64_t room = panels_room(BC, K) + NR;
  Scratch memory(threads * room);
  parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    float* weight = memory.data + worker * room;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * BC, n = smaller(BC, call.ids - first);
      pack_transposed(call.weight.data + first * call.weight.row_stride, call.weight.row_stride, n, K, nullptr, weight);
      multiply_in_pieces<PackedRows>(call.rows, n, K, hidden.data, MR * K, weight, NR * K, call.z.data + first,
                                     call.z.row_stride, false);
    }
  });
}

void float_product_gradients(const FloatProductGradients& call, int threads) {
  const GradientPlan plan(call);
  Scratch hidden(plan.hidden_room()), parts(plan.parts * plan.part_room()), memory(threads * plan.worker_room());
  if (plan.want_weight)
    pack_plain(call.hidden.data, call.hidden.row_stride, call.rows, call.width, nullptr, hidden.data, NR * call.rows);
  parallel_for(plan.parts, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t k = begin; k < end; ++k) {
      float* part = parts.data + k * plan.part_room();
      const int64_t first = k * plan.part_tiles, last = smaller(first + plan.part_tiles, plan.tiles);
      for (int64_t tile = first; tile < last; ++tile)
        gradient_tile(plan, tile, hidden.data, part, tile == first, memory.data + worker * plan.worker_room());
    }
  });
  if (plan.want_hidden)
    sum_parts(parts.data, plan.parts, plan.part_room(), plan.stride, call.rows, call.width, call.d_hidden, threads);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
