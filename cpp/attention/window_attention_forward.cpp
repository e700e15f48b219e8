// Forward of windowed attention: one task is one head of a block of windows.
#include "attention/window_attention_kernels.hpp"
#include "attention/window_regions.hpp"
#include "core/parallel_for.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Work memory of a task; sizes for whole windows.
struct Rooms {
  float *whole, *part, *rows, *inverse, *q, *k, *v, *score, *out;
};

VLM_INLINE int64_t lay_out(const Shape& s, int64_t width, float* base, Rooms* to) {
  int64_t at = 0;
  const int64_t n = s.positions;
  float** rooms[] = {&to->whole, &to->part, &to->rows, &to->inverse, &to->q, &to->k, &to->v, &to->score, &to->out};
  const int64_t sizes[] = {n * s.stride,          n * s.stride,          n * width, n, packed_rows_room(n, width),
                           panels_room(n, width), panels_room(width, n), s.tiles * n * LDS, n * s.padded_width};
  for (int i = 0; i < 9; ++i) {
    *rooms[i] = base + at;
    at += round_up(sizes[i] + W, 16);
  }
  return at;
}

// exp of the logits of one row, over all its tiles; returns their sum and the largest logit.
VLM_INLINE float softmax_row(float* score, int64_t tile_stride, const float* bias, int64_t n, float tau,
    float* largest) {
  vf top = splat(-infinity);
  for (int64_t t0 = 0; t0 < n; t0 += BC, score += tile_stride) {
    const int64_t end = smaller(n - t0, BC);
    for (int64_t j = 0; j < end; j += W) {
      const vf s = load(score + j) * tau + load(bias + t0 + j);
      store(score + j, s);
      top = maximum(top, s);
    }
  }
  const float most = max_lanes(top);
  score -= ceil_div(n, BC) * tile_stride;
  vf sum{};
  for (int64_t t0 = 0; t0 < n; t0 += BC, score += tile_stride) {
    const int64_t end = smaller(n - t0, BC);
    for (int64_t j = 0; j < end; j += W) {
      const vf e = exp(load(score + j) - most);
      store(score + j, e);
      sum += e;
    }
  }
  *largest = most;
  return sum_lanes(sum);
}

void attend(const WindowAttentionForward& call, const Shape& s, const Rooms& room, int64_t map, int64_t head,
            const Region& r) {
  const WindowAttentionProblem& p = call.problem;
  const int64_t n = positions_of(r), D = p.width, channels = p.heads * D;
  const float* base = p.qkv.data + map * p.qkv.batch_stride + head * D;
  const int64_t down = p.qkv.head_stride, side = p.qkv.row_stride;
  const float* bias = room.whole;
  const int64_t bias_stride = round_up(n, W);
  if (n < s.positions) {
    region_bias(p, s, r, room.whole, room.part);
    bias = room.part;
  }
  gather(base, down, side, r, D, room.rows);
  unit_rows(room.rows, n, D, room.inverse);
  pack_rows(room.rows, D, n, D, 1.0f, room.q);
  gather(base + channels, down, side, r, D, room.rows);
  unit_rows(room.rows, n, D, room.inverse);
  pack_transposed(room.rows, D, n, D, nullptr, room.k);
  gather(base + 2 * channels, down, side, r, D, room.rows);
  pack_plain(room.rows, D, n, D, nullptr, room.v, n * NR);
  const int64_t tile_stride = n * LDS;
  for (int64_t t0 = 0; t0 < n; t0 += BC)
    multiply<PackedRows>(n, smaller(n - t0, BC), D, room.q, MR * D, room.k + t0 * D, NR * D,
                         room.score + t0 / BC * tile_stride, LDS, false);
  float* lse = call.lse + (map * p.heads + head) * p.rows * p.columns;
  for (int64_t i = 0; i < n; ++i) {
    float most;
    const float sum = softmax_row(room.score + i * LDS, tile_stride, bias + i * bias_stride, n, p.tau[head], &most);
    room.inverse[i] = 1.0f / sum;
    lse[(r.row + i / r.columns) * p.columns + r.column + i % r.columns] = most + __builtin_logf(sum);
  }
  for (int64_t t0 = 0; t0 < n; t0 += BC)
    multiply<TileRows>(n, D, smaller(n - t0, BC), room.score + t0 / BC * tile_stride, MR * LDS, room.v + t0 * NR,
        n * NR,
                       room.out, s.padded_width, t0 > 0);
  const float* from = room.out;
  int64_t i = 0;
  for (int64_t a = 0; a < r.rows; ++a)
    for (int64_t b = 0; b < r.columns; ++b, ++i, from += s.padded_width) {
      float* to = call.out + ((map * p.rows + r.row + a) * p.columns + r.column + b) * channels + head * D;
      for (int64_t c = 0; c < D; c += W) store_first(to + c, load(from + c) * room.inverse[i], D - c);
    }
}

}  // namespace

void window_attention_forward(const WindowAttentionForward& call, int threads) {
  const WindowAttentionProblem& p = call.problem;
  const Shape s = shape_of(p);
  if (p.batch * p.rows * p.columns == 0) return;
  Rooms none;
  const int64_t room = lay_out(s, p.width, nullptr, &none);
  parallel_for(p.heads * s.blocks, 1, threads, [&](int64_t begin, int64_t end, int) {
    Scratch scratch(room);
    Rooms rooms;
    lay_out(s, p.width, scratch.data, &rooms);
    int64_t expanded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / s.blocks, first = task % s.blocks * WINDOWS;
      if (head != expanded) expand_bias(p, s, expanded = head, rooms.whole);
      for (int64_t w = first; w < smaller(first + WINDOWS, p.batch * s.windows); ++w) {
        const Regions regions = regions_of(p, w % s.windows);
        for (int k = 0; k < regions.count; ++k) attend(call, s, rooms, w / s.windows, head, regions.part[k]);
      }
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
