// The two drivers of pairwise losses: a forward sweep that feeds row and column statistics, and a backward sweep that
// turns recomputed logits into gradients. What happens to a tile of logits is the Rule's business. Per-level code.
//
// Rows are cut into at most 32 chunks by shape alone. A chunk owns its rows' results outright, and keeps its own
// partial column results, which are then merged in chunk order: no atomics, the same bits for any number of threads.
#pragma once

#include "contrastive/pair_pack.hpp"

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
  float* data;     // row stride LDS; columns from `breadth` to the next multiple of W hold the product with zeros
  float* teacher;  // likewise, the teacher's products; null without one
  float* spare;    // a tile to write to; null for plain targets
  int64_t row, column, height, breadth;
  int64_t chunk;
};

// Both sides of the products, packed: x in groups of MR rows with the scale folded in (a block at a time for
// bfloat16, so that no float32 copy of it exists), and the panels of 256 columns of y; the same for the teacher.
class Operands {
 public:
  Operands(const PairProblem& problem, int threads)
      : p(problem), x(rows_of(problem.x, problem.half)), y(rows_of(problem.y, problem.half)),
        teacher(problem.teacher.x.data != nullptr),
        groups(problem.half ? 0 : packed_rows_room(problem.rows, problem.width)),
        panels(panels_room(BC, steps(problem.width))),
        teacher_panels(teacher ? panels_room(BC, problem.teacher.width) : 0) {
    if (p.half) return;
    parallel_for((p.rows + MR - 1) / MR, 16, threads, [&](int64_t begin, int64_t end, int) {
      const int64_t first = begin * MR, last = smaller(end * MR, p.rows);
      pack_side_rows(x, first, last - first, p.width, p.scale, groups.data + first * p.width);
    });
  }

  void take_columns(int64_t column, int64_t breadth, int threads) {
    pack_side_panels(y, column, breadth, p.width, threads, panels.data);
    if (teacher)
      pack_panels(rows_of(p.teacher.y, false), column, breadth, p.teacher.width, threads, teacher_panels.data);
  }

  // Work memory of one thread for `fill`.
  int64_t block_room() const {
    return (p.half ? packed_rows_room(BLOCK_ROWS, steps(p.width)) : 0) +
           (teacher ? packed_rows_room(BLOCK_ROWS, p.teacher.width) : 0);
  }

  // Logits of the tile, and the teacher's.
  void fill(const LogitTile& t, float* block) const {
    const float* a = groups.data + t.row * p.width;
    if (p.half) {
      pack_side_rows(x, t.row, t.height, p.width, p.scale, block);
      a = block;
      block += packed_rows_room(BLOCK_ROWS, steps(p.width));
    }
    multiply_packed(t.height, t.breadth, p.width, a, panels.data, t.data, p.scale);
    if (!teacher) return;
    const int64_t width = p.teacher.width;
    pack_row_groups(rows_of(p.teacher.x, false), t.row, t.height, width, p.teacher.scale, block);
    multiply<PackedRows>(t.height, t.breadth, width, block, MR * width, teacher_panels.data, NR * width, t.teacher, LDS,
                         false);
  }

  const PairProblem& p;
  const Rows x, y;
  const bool teacher;

 private:
  Scratch groups, panels, teacher_panels;
};

constexpr int64_t TILE_ROOM = BLOCK_ROWS * LDS;

// Tiles of one thread, from its work memory of tiles_room floats.
VLM_INLINE int64_t tiles_room(const Operands& operands, bool plain) {
  return TILE_ROOM * (1 + operands.teacher + !plain) + operands.block_room();
}
VLM_INLINE LogitTile tile_at(float* work, const Operands& operands, bool plain, int64_t row, int64_t column,
                             int64_t height, int64_t breadth, int64_t chunk) {
  float* spare = plain ? nullptr : work + TILE_ROOM;
  float* teacher = operands.teacher ? work + 2 * TILE_ROOM : nullptr;
  return {work, teacher, spare, row, column, height, breadth, chunk};
}

// rule.forward_tile(tile) for every tile; tiles of one chunk come in order of their columns and from one thread.
template <class Rule>
static void sweep_forward(const PairProblem& p, Rule& rule, bool plain, int threads) {
  const RowChunks chunks = cut_rows(p.rows);
  Operands operands(p, threads);
  const int64_t room = tiles_room(operands, plain);
  Scratch work(threads * room);
  for (int64_t column = 0; column < p.columns; column += BC) {
    const int64_t breadth = smaller(BC, p.columns - column);
    operands.take_columns(column, breadth, threads);
    parallel_for(chunks.count, 1, threads, [&](int64_t chunk, int64_t, int worker) {
      float* own = work.data + worker * room;
      const int64_t last = smaller((chunk + 1) * chunks.size, p.rows);
      for (int64_t row = chunk * chunks.size; row < last; row += BLOCK_ROWS) {
        const LogitTile tile =
            tile_at(own, operands, plain, row, column, smaller(BLOCK_ROWS, last - row), breadth, chunk);
        operands.fill(tile, own + room - operands.block_room());
        rule.forward_tile(tile);
      }
    });
  }
}

// rule.gradient_tile(tile) replaces logits by scale * dloss/dlogit; the sweep makes dx and dy of it.
template <class Rule>
static void sweep_backward(const PairProblem& p, Rule& rule, bool plain, MutableMatrix dx, MutableMatrix dy,
                           int threads) {
  const RowChunks chunks = cut_rows(p.rows);
  Operands operands(p, threads);
  const int64_t E = p.width, stride = round_up(larger(E, 1), W);
  const bool want_x = dx.data != nullptr, want_y = dy.data != nullptr;
  const int64_t plain_y_room = want_x ? round_up(E, NR) * steps(BC) : 0;
  const int64_t dy_room = want_y ? BC * stride : 0;
  const int64_t tile_room = tiles_room(operands, plain), dx_room = want_x ? BLOCK_ROWS * stride : 0;
  const int64_t plain_x_room = want_y ? round_up(E, NR) * steps(BLOCK_ROWS) : 0;
  const int64_t rounded_room = larger(tile_rows_room(BLOCK_ROWS), tile_columns_room(BLOCK_ROWS));
  const int64_t worker_room = tile_room + dx_room + plain_x_room + rounded_room;
  Scratch plain_y(plain_y_room), dy_parts(chunks.count * dy_room), work(threads * worker_room);
  if (want_x && p.columns == 0)
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t e = 0; e < E; ++e) dx.data[i * dx.row_stride + e] = 0.0f;

  for (int64_t column = 0; column < p.columns; column += BC) {
    const int64_t breadth = smaller(BC, p.columns - column);
    operands.take_columns(column, breadth, threads);
    if (want_x)
      parallel_for((E + NR - 1) / NR, 4, threads, [&](int64_t begin, int64_t end, int) {
        pack_side_as_is(operands.y, column, breadth, begin * NR, smaller(end * NR, E), plain_y.data, NR * steps(BC));
      });
    parallel_for(chunks.count, 1, threads, [&](int64_t chunk, int64_t, int worker) {
      float* own = work.data + worker * worker_room;
      float* dx_tile = own + tile_room;
      float* plain_x = dx_tile + dx_room;
      float* rounded = plain_x + plain_x_room;
      const int64_t first = chunk * chunks.size, last = smaller(first + chunks.size, p.rows);
      for (int64_t row = first; row < last; row += BLOCK_ROWS) {
        const int64_t height = smaller(BLOCK_ROWS, last - row);
        const LogitTile tile = tile_at(own, operands, plain, row, column, height, breadth, chunk);
        operands.fill(tile, own + tile_room - operands.block_room());
        rule.gradient_tile(tile);
        if (want_x) {
          multiply_rows(height, E, breadth, as_rows(tile.data, height, breadth, rounded), plain_y.data, NR * steps(BC),
                        dx_tile, stride, false);
          for (int64_t r = 0; r < height; ++r) {
            float* to = dx.data + (row + r) * dx.row_stride;
            for (int64_t e = 0; e < E; e += W) {
              const vf part = load(dx_tile + r * stride + e);
              store_first(to + e, column == 0 ? part : part + load_first(to + e, E - e), E - e);
            }
          }
        }
        if (want_y) {
          pack_side_as_is(operands.x, row, height, 0, E, plain_x, NR * steps(BLOCK_ROWS));
          multiply_columns(breadth, E, height, as_columns(tile.data, height, breadth, rounded), plain_x,
                           NR * steps(BLOCK_ROWS), dy_parts.data + chunk * dy_room, stride, row > first);
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
