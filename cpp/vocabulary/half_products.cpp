// Products of bfloat16 matrices for the vocabulary losses. Compiled for level avx512_bf16 only.
//
// Both walk over tiles of BC ids, whose rows of `weight` are packed once and meet all rows of `hidden`.
#include "core/parallel_for.hpp"
#include "core/tile_bf16.hpp"
#include "vocabulary/half_kernels.hpp"
#include "vocabulary/partial_sums.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t PARTS = 8, PART_TILES = 8;  // partial sums of dh: at most so many, each of at least so many tiles
constexpr int64_t BLOCK = 256;  // rows that meet a tile at once: their panels stay in the cache

// C [M, N] (+)= A B where C has no room beyond N: the last incomplete vector goes through `spare` [M, W].
template <class A>
void multiply_exactly(int64_t M, int64_t N, int64_t K, const float* a, int64_t group_stride, const float* b,
                      int64_t panel_stride, float* c, int64_t ldc, bool accumulate, float* spare) {
  const int64_t whole = N / NR * NR, rest = N - whole;
  multiply_pairs<A>(M, whole, K, a, group_stride, b, panel_stride, c, ldc, 1.0f, accumulate);
  if (rest == 0) return;
  const float* panel = b + whole / NR * panel_stride;
  multiply_pairs<A>(M, rest, K, a, group_stride, panel, panel_stride, spare, NR, 1.0f, false);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t e = 0; e < rest; e += W) {
      float* to = c + m * ldc + whole + e;
      const vf value = load(spare + m * NR + e);
      store_first(to, accumulate ? load_first(to, rest - e) + value : value, rest - e);
    }
}

struct GradientPlan {
  const HalfProductGradients& call;
  int64_t tiles, parts, part_tiles, row_pairs, stride;
  bool want_hidden, want_weight;

  explicit GradientPlan(const HalfProductGradients& c)
      : call(c),
        tiles((c.ids + BC - 1) / BC),
        row_pairs(pairs(c.rows)),
        stride(round_up(larger(c.width, 1), W)),
        want_hidden(c.d_hidden.data != nullptr),
        want_weight(c.d_weight.data != nullptr) {
    part_tiles = larger(PART_TILES, (tiles + PARTS - 1) / PARTS);
    parts = (tiles + part_tiles - 1) / part_tiles;
  }
  int64_t hidden_room() const { return want_weight ? row_pairs * round_up(call.width, NR) : 0; }
  int64_t part_room() const { return want_hidden ? call.rows * stride : 0; }
  // Of a worker: a block of g in either form, the tile of `weight` as panels, the spare columns.
  int64_t columns_room() const { return want_weight ? BLOCK / 2 * LDS : 0; }
  int64_t rows_room() const { return want_hidden ? BLOCK * (LDS / 2) : 0; }
  int64_t weight_room() const { return want_hidden ? pairs(BC) * round_up(call.width, NR) : 0; }
  int64_t worker_room() const { return columns_room() + rows_room() + weight_room() + BC * NR; }
};

void gradient_tile(const GradientPlan& s, int64_t tile, const float* hidden, float* part, bool first_of_part,
                   float* work) {
  const HalfProductGradients& c = s.call;
  const int64_t first = tile * BC, n = smaller(BC, c.ids - first);
  float *columns = work, *rows = columns + s.columns_room(), *weight = rows + s.rows_room();
  float* spare = weight + s.weight_room();
  if (s.want_hidden)
    pack_pairs_plain(c.weight.data + first * c.weight.row_stride, c.weight.row_stride, n, c.width, nullptr, weight,
                     NR * pairs(BC));
  for (int64_t i0 = 0; i0 < c.rows; i0 += BLOCK) {
    const int64_t height = smaller(BLOCK, c.rows - i0), stride = c.gradient.row_stride;
    const float* block = c.gradient.data + i0 * stride + first;
    if (s.want_weight) {
      for (int64_t i = 0; i < height; i += 2)
        round_two_rows(block + i * stride, i + 1 < height ? block + (i + 1) * stride : nullptr, n,
                       columns + i / 2 * LDS);
      multiply_exactly<PairTileColumns>(n, c.width, pairs(height), columns, MR, hidden + i0 / 2 * NR, NR * s.row_pairs,
                                        c.d_weight.data + first * c.d_weight.row_stride, c.d_weight.row_stride, true,
                                        spare);
    }
    if (s.want_hidden) {
      for (int64_t i = 0; i < height; ++i) round_row(block + i * stride, n, rows + i * (LDS / 2));
      multiply_pairs<PairTileRows>(height, c.width, pairs(n), rows, MR * (LDS / 2), weight, NR * pairs(BC),
                                   part + i0 * s.stride, s.stride, 1.0f, !first_of_part);
    }
  }
}

}  // namespace

void product_rows(const HalfProduct& call, int threads) {
  const int64_t K = pairs(call.width), tiles = (call.ids + BC - 1) / BC;
  Scratch hidden(packed_rows_room(call.rows, K));
  parallel_for((call.rows + MR - 1) / MR, 8, threads, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * MR, last = smaller(end * MR, call.rows);
    pack_pair_rows(call.hidden.data + first * call.hidden.row_stride, call.hidden.row_stride, last - first, call.width,
                   hidden.data + first * K);
  });
  const int64_t panels = panels_room(BC, K), room = panels + call.rows * NR;
  Scratch memory(threads * room);
  parallel_for(tiles, 1, threads, [&](int64_t tile, int64_t, int worker) {
    const int64_t first = tile * BC, n = smaller(BC, call.ids - first);
    float* weight = memory.data + worker * room;
    pack_pairs_transposed(call.weight.data + first * call.weight.row_stride, call.weight.row_stride, n, call.width,
                          nullptr, weight);
    multiply_exactly<PairRows>(call.rows, n, K, hidden.data, MR * K, weight, NR * K, call.z.data + first,
                               call.z.row_stride, false, weight + panels);
  });
}

void product_gradients(const HalfProductGradients& call, int threads) {
  const GradientPlan plan(call);
  Scratch hidden(plan.hidden_room()), parts(plan.parts * plan.part_room()), memory(threads * plan.worker_room());
  if (plan.want_weight)
    pack_pairs_plain(call.hidden.data, call.hidden.row_stride, call.rows, call.width, nullptr, hidden.data,
                     NR * plan.row_pairs);
  parallel_for(plan.parts, 1, threads, [&](int64_t k, int64_t, int worker) {
    float* part = parts.data + k * plan.part_room();
    const int64_t first = k * plan.part_tiles, last = smaller(first + plan.part_tiles, plan.tiles);
    for (int64_t tile = first; tile < last; ++tile)
      gradient_tile(plan, tile, hidden.data, part, tile == first, memory.data + worker * plan.worker_room());
  });
  if (plan.want_hidden)
    sum_parts(parts.data, plan.parts, plan.part_room(), plan.stride, call.rows, call.width, call.d_hidden, threads);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
