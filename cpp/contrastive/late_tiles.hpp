// The sweep of late interaction over tiles of token scores: sums of maxima by row sample and by column sample, and, if
// asked for, where each maximum was. Per-level code.
//
// Kept tokens of all samples lie one after the other, so a tile holds several samples or a part of one. A block of
// columns holds whole column samples (or one that is longer than a tile); a chunk of rows holds whole row samples and
// is one thread's work. What a chunk writes belongs to it alone.
#pragma once

#include "core/kernel_table.hpp"
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"

namespace vlm {
namespace VLM_LEVEL {

constexpr int64_t LATE_ROWS = 8 * MR;  // rows of a tile

struct LateTargets {
  float *row_values, *column_values;  // sums of maxima [R, C], set to 0 before; both null if not wanted
  uint16_t *row_best, *column_best;   // with Find: [rows of the range, C] and [samples of the range, columns.count]
};

// Tokens [begin, begin + count) interleaved as groups of Width.
template <int Width>
static void pack_tokens(const TokenList& list, int64_t begin, int64_t count, int64_t E, float* to) {
  for (int64_t r = 0; r < count; r += Width, to += Width * E) {
    const int64_t rows = smaller(Width, count - r);
    const int64_t* source = list.source + begin + r;
    int64_t run = 0;  // neighbours at the usual distance are interleaved together
    while (run < rows && source[run] == source[0] + run * list.token_stride) ++run;
    if (run == rows) {
      interleave<Width>(list.data + source[0], list.token_stride, rows, E, 1.0f, nullptr, to);
      continue;
    }
    for (int64_t k = 0; k < E; ++k)
      for (int64_t l = 0; l < Width; ++l) to[k * Width + l] = l < rows ? list.data[source[l] + k] : 0.0f;
  }
}

VLM_INLINE int64_t column_block_end(const TokenList& columns, int64_t from) {
  int64_t to = from + 1;
  while (to < columns.samples && columns.first[to + 1] - columns.first[from] <= BC) ++to;
  return to;
}

VLM_INLINE vi lanes_between(int64_t from, int64_t to) {
  const vi lane = lane_numbers();
  const int32_t low = static_cast<int32_t>(larger(from, -1)), high = static_cast<int32_t>(smaller(to, W));
  return (lane >= splat_int(low)) & (lane < splat_int(high));
}

// A maximum and where it was first; places are kept as floats, exact below 2^24.
struct Best {
  vf value, place;
  VLM_INLINE_MEMBER void meet(vf candidate, vf at) {
    const vi better = candidate > value;
    value = select(better, candidate, value);
    place = select(better, at, place);
  }
};

template <bool Find>
struct LateTile {
  const TokenList &rows, &columns;
  const LateTargets& out;
  int64_t range_row, range_sample;  // first row and sample of the range: where row_best and column_best begin
  float* data;                      // [LATE_ROWS, LDS]
  float *row_value, *row_place;     // [LATE_ROWS]: of a column sample that goes on in the next tile
  float *column_value, *column_place;  // [columns of the block]: of a row sample that goes on in the next tile
  float* maxima;                    // [BC + W]

  // Columns [c0, c1) of sample j in a tile that begins at column `left`; rows [top, top + height).
  void row_maxima(int64_t top, int64_t height, int64_t left, int64_t c0, int64_t c1, int64_t j, int64_t* owner) {
    const bool goes_on = c0 > columns.first[j], stops = c1 == columns.first[j + 1];
    const int64_t begin = c0 - left, end = c1 - left, aligned = begin / W * W;
    const float shift = static_cast<float>(left - columns.first[j]);
    vf lanes{};
    for (int l = 0; l < W; ++l) lanes[l] = static_cast<float>(l);
    for (int64_t r = 0; r < height; ++r) {
      const float* scores = data + r * LDS;
      Best best{splat(-infinity), vf{}};
      for (int64_t c = aligned; c < end; c += W) {
        vf value = load(scores + c);
        if (c < begin || c + W > end) value = select(lanes_between(begin - c, end - c), value, splat(-infinity));
        if constexpr (Find)
          best.meet(value, lanes + (static_cast<float>(c) + shift));
        else
          best.value = maximum(value, best.value);
      }
      float value = max_lanes(best.value), place = 0.0f;
      if constexpr (Find) {
        const vi there = best.value == splat(value);
        place = -max_lanes(select(there, -best.place, splat(-infinity)));
        if (!(place >= 0.0f && place < 65536.0f)) place = 0.0f;  // nothing but NaN was met
      }
      if (goes_on && !(value > row_value[r])) {
        value = row_value[r];
        place = row_place[r];
      }
      if (!stops) {
        row_value[r] = value;
        row_place[r] = place;
        continue;
      }
      if constexpr (Find) out.row_best[(top + r - range_row) * columns.samples + j] = static_cast<uint16_t>(place);
      if (out.row_values != nullptr) out.row_values[owner[r] * columns.samples + j] += value;
    }
  }

  // Rows [r0, r1) of sample i in a tile that begins at row `top`, for `breadth` columns from `left`.
  void column_maxima(int64_t top, int64_t r0, int64_t r1, int64_t i, int64_t left, int64_t breadth,
                     int64_t block_left) {
    const bool goes_on = r0 > rows.first[i], stops = r1 == rows.first[i + 1];
    float* values = column_value + (left - block_left);
    float* places = column_place + (left - block_left);
    for (int64_t c = 0; c < breadth; c += W) {
      Best best = goes_on ? Best{load(values + c), load(places + c)} : Best{splat(-infinity), vf{}};
      const float* scores = data + (r0 - top) * LDS + c;
      for (int64_t r = r0; r < r1; ++r, scores += LDS) {
        if constexpr (Find)
          best.meet(load(scores), splat(static_cast<float>(r - rows.first[i])));
        else
          best.value = maximum(load(scores), best.value);
      }
      if (!stops) {
        store(values + c, best.value);
        store(places + c, best.place);
        continue;
      }
      store(maxima + c, best.value);
      if constexpr (Find) {
        uint16_t* to = out.column_best + (i - range_sample) * columns.count + left + c;
        for (int64_t l = 0; l < W && c + l < breadth; ++l) to[l] = static_cast<uint16_t>(best.place[l]);
      }
    }
  }

  void add_column_sums(int64_t i, int64_t j, int64_t begin, int64_t end) {
    float sum = 0.0f;
    for (int64_t c = begin; c < end; ++c) sum += maxima[c];
    out.column_values[i * columns.samples + j] += sum;
  }
};

// Every tile of the row samples [from, to) against all columns.
template <bool Find>
static void late_sweep(const TokenList& rows, const TokenList& columns, int64_t E, int64_t from, int64_t to,
                       const LateTargets& out, int threads) {
  const int64_t range_row = rows.first[from], count = rows.first[to] - range_row;
  const int64_t per = larger(1, 4 * LATE_ROWS / larger(rows.longest, 1)), chunks = (to - from + per - 1) / per;
  const auto packed_at = [&](int64_t chunk) {
    return (rows.first[from + chunk * per] - range_row + chunk * MR) * E;
  };
  const int64_t widest = round_up(larger(BC, columns.longest), W) + W;
  const int64_t room = LATE_ROWS * LDS + 2 * LATE_ROWS + 2 * widest + BC + W;
  Scratch packed((count + chunks * MR) * E), panels(round_up(widest, NR) * E), work(threads * room);
  Scratch owners(threads * 2 * LATE_ROWS);  // int64
  parallel_for(chunks, 1, threads, [&](int64_t chunk, int64_t, int) {
    const int64_t first = from + chunk * per, last = smaller(first + per, to);
    pack_tokens<MR>(rows, rows.first[first], rows.first[last] - rows.first[first], E, packed.data + packed_at(chunk));
  });
  for (int64_t j0 = 0, j1; j0 < columns.samples; j0 = j1) {
    j1 = column_block_end(columns, j0);
    const int64_t block_left = columns.first[j0], block_right = columns.first[j1];
    parallel_for((block_right - block_left + NR - 1) / NR, 1, threads, [&](int64_t panel, int64_t, int) {
      const int64_t begin = block_left + panel * NR;
      pack_tokens<NR>(columns, begin, smaller(NR, block_right - begin), E, panels.data + panel * NR * E);
    });
    parallel_for(chunks, 1, threads, [&](int64_t chunk, int64_t, int worker) {
      float* space = work.data + worker * room;
      float* row_state = space + LATE_ROWS * LDS;
      float* column_state = row_state + 2 * LATE_ROWS;
      int64_t* owner = reinterpret_cast<int64_t*>(owners.data) + worker * LATE_ROWS;
      LateTile<Find> tile{rows, columns, out, range_row, from, space, row_state, row_state + LATE_ROWS,
                          column_state, column_state + widest, column_state + 2 * widest};
      const int64_t first = from + chunk * per, last = smaller(first + per, to);
      const int64_t chunk_top = rows.first[first], chunk_bottom = rows.first[last];
      const float* a = packed.data + packed_at(chunk);
      int64_t sample = first;
      for (int64_t top = chunk_top; top < chunk_bottom; top += LATE_ROWS) {
        const int64_t height = smaller(LATE_ROWS, chunk_bottom - top), bottom = top + height;
        while (rows.first[sample + 1] <= top) ++sample;
        for (int64_t r = 0, i = sample; r < height; ++r) {
          while (rows.first[i + 1] <= top + r) ++i;
          owner[r] = i;
        }
        int64_t j = j0;
        for (int64_t left = block_left; left < block_right; left += BC) {
          const int64_t breadth = smaller(BC, block_right - left), right = left + breadth;
          multiply<PackedRows>(height, breadth, E, a + (top - chunk_top) * E, MR * E,
                               panels.data + (left - block_left) * E, NR * E, tile.data, LDS, false);
          while (columns.first[j + 1] <= left) ++j;
          const int64_t first_column_sample = j;
          for (int64_t k = j; k < j1 && columns.first[k] < right; ++k) {
            const int64_t c0 = larger(columns.first[k], left), c1 = smaller(columns.first[k + 1], right);
            if (c0 < c1) tile.row_maxima(top, height, left, c0, c1, k, owner);
          }
          for (int64_t i = sample; i < last && rows.first[i] < bottom; ++i) {
            const int64_t r0 = larger(rows.first[i], top), r1 = smaller(rows.first[i + 1], bottom);
            if (r0 == r1) continue;
            tile.column_maxima(top, r0, r1, i, left, breadth, block_left);
            if (out.column_values == nullptr || r1 < rows.first[i + 1]) continue;
            for (int64_t k = first_column_sample; k < j1 && columns.first[k] < right; ++k)
              tile.add_column_sums(i, k, larger(columns.first[k], left) - left,
                                   smaller(columns.first[k + 1], right) - left);
          }
        }
      }
    });
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
