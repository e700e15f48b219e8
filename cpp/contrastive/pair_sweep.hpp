// The two drivers of pairwise losses: a forward sweep that feeds row and column statistics, and a backward sweep that
// turns recomputed logits into gradients. What happens to a tile of logits is the Rule's business. Per-level code.
//
// Rows are cut into at most 32 chunks by shape alone. A chunk owns its rows' results outright, and keeps its own
// partial column results, which are then merged in chunk order: no atomics, the same bits for any number of threads.
#pragma once

#include "core/kernel_table.hpp"
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int64_t BLOCK_ROWS = 8 * MR;  // rows of a tile of logits
constexpr int64_t MAX_CHUNKS = 32;

struct RowChunks {
  int64_t rows, size, count;
};

VLM_INLINE RowChunks cut_rows(int64_t rows) {
  const int64_t size = larger(BLOCK_ROWS, round_up((rows + MAX_CHUNKS - 1) / MAX_CHUNKS, BLOCK_ROWS));
  return {rows, size, (rows + size - 1) / size};
}

// A tile of logits and where it lies: rows [row, row + height), columns [column, column + breadth).
struct LogitTile {
  float* data;  // row stride LDS; columns from `breadth` to the next multiple of W hold the product with zeros
  int64_t row, column, height, breadth;
  int64_t chunk;
};

// x in groups of MR rows with the scale folded in.
static void pack_all_rows(const PairProblem& p, int threads, float* to) {
  const int64_t groups = (p.rows + MR - 1) / MR;
  parallel_for(groups, 16, threads, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * MR, last = smaller(end * MR, p.rows);
    pack_rows(p.x.data + first * p.x.row_stride, p.x.row_stride, last - first, p.width, p.scale,
              to + begin * MR * p.width);
  });
}

// Columns [first, first + count) of the problem as panels of y^T; `first` is a multiple of NR.
static void pack_columns(const PairProblem& p, int64_t first, int64_t count, int threads, float* to) {
  const int64_t panels = (count + NR - 1) / NR;
  parallel_for(panels, 1, threads, [&](int64_t begin, int64_t end, int) {
    const int64_t from = begin * NR, last = smaller(end * NR, count);
    pack_transposed(p.y.data + (first + from) * p.y.row_stride, p.y.row_stride, last - from, p.width, nullptr,
                    to + from * p.width);
  });
}

// rule.forward_tile(tile) for every tile; tiles of one chunk come in order and from one thread.
template <class Rule>
static void sweep_forward(const PairProblem& p, Rule& rule, int threads) {
  const RowChunks chunks = cut_rows(p.rows);
  Scratch x(packed_rows_room(p.rows, p.width)), y(panels_room(p.columns, p.width));
  Scratch tiles(threads * BLOCK_ROWS * LDS);
  pack_all_rows(p, threads, x.data);
  pack_columns(p, 0, p.columns, threads, y.data);
  parallel_for(chunks.count, 1, threads, [&](int64_t chunk, int64_t, int worker) {
    float* tile = tiles.data + worker * BLOCK_ROWS * LDS;
    const int64_t last = smaller((chunk + 1) * chunks.size, p.rows);
    for (int64_t row = chunk * chunks.size; row < last; row += BLOCK_ROWS) {
      const int64_t height = smaller(BLOCK_ROWS, last - row);
      for (int64_t column = 0; column < p.columns; column += BC) {
        const int64_t breadth = smaller(BC, p.columns - column);
        multiply<PackedRows>(height, breadth, p.width, x.data + row * p.width, MR * p.width, y.data + column * p.width,
                             NR * p.width, tile, LDS, false);
        rule.forward_tile(LogitTile{tile, row, column, height, breadth, chunk});
      }
    }
  });
}

// rule.gradient_tile(tile) replaces logits by scale * dloss/dlogit; the sweep makes dx and dy of it.
template <class Rule>
static void sweep_backward(const PairProblem& p, Rule& rule, MutableMatrix dx, MutableMatrix dy, int threads) {
  const RowChunks chunks = cut_rows(p.rows);
  const int64_t E = p.width, stride = round_up(larger(E, 1), W);
  const bool want_x = dx.data != nullptr, want_y = dy.data != nullptr;
  const int64_t plain_y_room = want_x ? round_up(E, NR) * BC : 0;
  const int64_t dy_room = want_y ? BC * stride : 0;
  const int64_t tile_room = BLOCK_ROWS * LDS, dx_room = want_x ? BLOCK_ROWS * stride : 0;
  const int64_t plain_x_room = want_y ? round_up(E, NR) * BLOCK_ROWS : 0;
  const int64_t worker_room = tile_room + dx_room + plain_x_room;
  Scratch x(packed_rows_room(p.rows, E)), y(panels_room(BC, E)), plain_y(plain_y_room);
  Scratch dy_parts(chunks.count * dy_room), work(threads * worker_room);
  pack_all_rows(p, threads, x.data);
  if (want_x && p.columns == 0)
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t e = 0; e < E; ++e) dx.data[i * dx.row_stride + e] = 0.0f;

  for (int64_t column = 0; column < p.columns; column += BC) {
    const int64_t breadth = smaller(BC, p.columns - column);
    const float* y_rows = p.y.data + column * p.y.row_stride;
    pack_columns(p, column, breadth, threads, y.data);
    if (want_x)
      parallel_for((E + NR - 1) / NR, 4, threads, [&](int64_t begin, int64_t end, int) {
        pack_plain(y_rows + begin * NR, p.y.row_stride, breadth, smaller(end * NR, E) - begin * NR, nullptr,
                   plain_y.data + begin * NR * BC, NR * BC);
      });
    parallel_for(chunks.count, 1, threads, [&](int64_t chunk, int64_t, int worker) {
      float* tile = work.data + worker * worker_room;
      float* dx_tile = tile + tile_room;
      float* plain_x = dx_tile + dx_room;
      const int64_t first = chunk * chunks.size, last = smaller(first + chunks.size, p.rows);
      for (int64_t row = first; row < last; row += BLOCK_ROWS) {
        const int64_t height = smaller(BLOCK_ROWS, last - row);
        multiply<PackedRows>(height, breadth, E, x.data + row * E, MR * E, y.data, NR * E, tile, LDS, false);
        rule.gradient_tile(LogitTile{tile, row, column, height, breadth, chunk});
        if (want_x) {
          multiply<TileRows>(height, E, breadth, tile, MR * LDS, plain_y.data, NR * BC, dx_tile, stride, false);
          for (int64_t r = 0; r < height; ++r) {
            float* to = dx.data + (row + r) * dx.row_stride;
            for (int64_t e = 0; e < E; e += W) {
              const vf part = load(dx_tile + r * stride + e);
              store_first(to + e, column == 0 ? part : part + load_first(to + e, E - e), E - e);
            }
          }
        }
        if (want_y) {
          pack_plain(p.x.data + row * p.x.row_stride, p.x.row_stride, height, E, nullptr, plain_x, NR * BLOCK_ROWS);
          multiply<TileColumns>(breadth, E, height, tile, MR, plain_x, NR * BLOCK_ROWS, dy_parts.data + chunk * dy_room,
                                stride, row > first);
        }
      }
    });
    if (want_y)
      parallel_for(breadth, 16, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t j = begin; j < end; ++j)
          for (int64_t e = 0; e < E; e += W) {
            vf sum{};
            for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
              sum += load(dy_parts.data + chunk * dy_room + j * stride + e);
            store_first(dy.data + (column + j) * dy.row_stride + e, sum, E - e);
          }
      });
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
