// Backward of windowed attention: recomputes the probabilities of a region from its lse.
#include "attention/window_attention_kernels.hpp"
#include "attention/window_regions.hpp"
#include "core/parallel_for.hpp"
#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Work memory of a task; sizes for whole windows. pairs: gradient of the bias of every pair of a window.
struct Rooms {
  float *whole, *part, *pairs, *q, *k, *v, *dout, *q_inverse, *k_inverse, *lse, *lean;
  float *rows_packed, *columns_packed, *plain, *p, *ds, *product;
};

VLM_INLINE int64_t lay_out(const Shape& s, int64_t D, float* base, Rooms* to) {
  int64_t at = 0;
  const int64_t n = s.positions, square = n * s.stride, rows = n * D, tile = s.tiles * n * LDS;
  float** rooms[] = {&to->whole, &to->part, &to->pairs, &to->q, &to->k, &to->v, &to->dout, &to->q_inverse,
      &to->k_inverse,
                     &to->lse, &to->lean, &to->rows_packed, &to->columns_packed, &to->plain, &to->p, &to->ds,
                     &to->product};
  const int64_t sizes[] = {square, square, square, rows, rows, rows, rows, n, n, n, n, packed_rows_room(n, D),
                           panels_room(n, D), panels_room(D, n), tile, tile, n * s.padded_width};
  for (int i = 0; i < 17; ++i) {
    *rooms[i] = base + at;
    at += round_up(sizes[i] + W, 16);
  }
  return at;
}

// to [n, n] (over tiles) = rows [n, D] columns^T [n, D].
VLM_INLINE void all_pairs(const Rooms& room, const float* rows, const float* columns, int64_t n, int64_t D, float* to) {
  pack_rows(rows, D, n, D, 1.0f, room.rows_packed);
  pack_transposed(columns, D, n, D, nullptr, room.columns_packed);
  for (int64_t t0 = 0; t0 < n; t0 += BC)
    multiply<PackedRows>(n, smaller(n - t0, BC), D, room.rows_packed, MR * D, room.columns_packed + t0 * D, NR * D,
                         to + t0 / BC * n * LDS, LDS, false);
}

// product [n, D] = tile rows: sum_j tile_ij x_j.
VLM_INLINE void over_columns(const Rooms& room, const Shape& s, const float* tile, const float* x, int64_t n,
    int64_t D) {
  pack_plain(x, D, n, D, nullptr, room.plain, n * NR);
  for (int64_t t0 = 0; t0 < n; t0 += BC)
    multiply<TileRows>(n, D, smaller(n - t0, BC), tile + t0 / BC * n * LDS, MR * LDS, room.plain + t0 * NR, n * NR,
                       room.product, s.padded_width, t0 > 0);
}

// product [n, D] = tile columns: sum_i tile_ij x_i.
VLM_INLINE void over_rows(const Rooms& room, const Shape& s, const float* tile, const float* x, int64_t n, int64_t D) {
  pack_plain(x, D, n, D, nullptr, room.plain, n * NR);
  for (int64_t t0 = 0; t0 < n; t0 += BC)
    multiply<TileColumns>(smaller(n - t0, BC), D, n, tile + t0 / BC * n * LDS, MR, room.plain, n * NR,
                          room.product + t0 * s.padded_width, s.padded_width, false);
}

// Through the unit length: dx = tau (g - u <u, g>) / |x|, or tau g / 1e-12 where x is shorter than that.
// Returns sum_i <u_i, g_i>.
VLM_INLINE double write_through_unit(const WindowAttentionProblem& p, const Shape& s, const float* product,
    const float* unit,
                                     const float* inverse, float tau, const Region& r, float* to) {
  const int64_t D = p.width, stride = 3 * p.heads * D;
  double total = 0;
  for (int64_t i = 0; i < positions_of(r); ++i, product += s.padded_width, unit += D) {
    const float along = dot(product, unit, D), by = tau * inverse[i];
    total += static_cast<double>(along);
    const float less = inverse[i] < 1e12f ? along : 0.0f;
    float* row = to + ((r.row + i / r.columns) * p.columns + r.column + i % r.columns) * stride;
    int64_t c = 0;
    for (; c + W <= D; c += W) store(row + c, (load(product + c) - load(unit + c) * less) * by);
    for (; c < D; ++c) row[c] = (product[c] - unit[c] * less) * by;
  }
  return total;
}

// pairs += ds of a region.
VLM_INLINE void add_pairs(const WindowAttentionProblem& p, const Shape& s, const Region& r, const float* ds, int64_t n,
                          float* pairs) {
  const int64_t tile_stride = n * LDS;
  for (int64_t i = 0; i < n; ++i) {
    const float* from = ds + i * LDS;
    float* to = pairs + ((r.top + i / r.columns) * p.window_columns + r.left + i % r.columns) * s.stride;
    if (n == s.positions) {
      for (int64_t t0 = 0; t0 < n; t0 += BC, from += tile_stride)
        for (int64_t j = 0; j < smaller(n - t0, BC); j += W) store(to + t0 + j, load(to + t0 + j) + load(from + j));
      continue;
    }
    int64_t j = 0;
    for (int64_t v = 0; v < r.rows; ++v)
      for (int64_t u = 0; u < r.columns; ++u, ++j)
        to[(r.top + v) * p.window_columns + r.left + u] += from[j / BC * tile_stride + j % BC];
  }
}

// Gradients of one region; returns that of tau.
double attend(const WindowAttentionBackward& call, const Shape& s, const Rooms& room, int64_t map, int64_t head,
              const Region& r) {
  const WindowAttentionProblem& p = call.problem;
  const int64_t n = positions_of(r), D = p.width, channels = p.heads * D, tile_stride = n * LDS;
  const int64_t bias_stride = round_up(n, W);
  const float tau = p.tau[head];
  const float* bias = room.whole;
  if (n < s.positions) {
    region_bias(p, s, r, room.whole, room.part);
    bias = room.part;
  }
  const float* base = p.qkv.data + map * p.qkv.batch_stride + head * D;
  gather(base, p.qkv.head_stride, p.qkv.row_stride, r, D, room.q);
  gather(base + channels, p.qkv.head_stride, p.qkv.row_stride, r, D, room.k);
  gather(base + 2 * channels, p.qkv.head_stride, p.qkv.row_stride, r, D, room.v);
  gather(call.dout.data + map * call.dout.batch_stride + head * D, call.dout.head_stride, call.dout.row_stride, r, D,
         room.dout);
  const float* out = call.out + map * p.rows * p.columns * channels + head * D;
  const float* lse = call.lse + (map * p.heads + head) * p.rows * p.columns;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = (r.row + i / r.columns) * p.columns + r.column + i % r.columns;
    room.lse[i] = lse[at];
    room.lean[i] = dot(out + at * channels, room.dout + i * D, D);
  }
  unit_rows(room.q, n, D, room.q_inverse);
  unit_rows(room.k, n, D, room.k_inverse);
  all_pairs(room, room.q, room.k, n, D, room.p);
  all_pairs(room, room.dout, room.v, n, D, room.ds);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t t0 = 0; t0 < n; t0 += BC) {
      float* prob = room.p + t0 / BC * tile_stride + i * LDS;
      float* ds = room.ds + t0 / BC * tile_stride + i * LDS;
      for (int64_t j = 0; j < smaller(n - t0, BC); j += W) {
        const vf e = exp(load(prob + j) * tau + load(bias + i * bias_stride + t0 + j) - room.lse[i]);
        store(prob + j, e);
        store(ds + j, e * (load(ds + j) - room.lean[i]));
      }
    }
  add_pairs(p, s, r, room.ds, n, room.pairs);
  float* grad = call.dqkv + map * p.rows * p.columns * 3 * channels + head * D;
  over_rows(room, s, room.p, room.dout, n, D);
  for (int64_t i = 0; i < n; ++i) {
    float* row = grad + 2 * channels + ((r.row + i / r.columns) * p.columns + r.column + i % r.columns) * 3 * channels;
    for (int64_t c = 0; c < D; c += W) store_first(row + c, load(room.product + i * s.padded_width + c), D - c);
  }
  over_rows(room, s, room.ds, room.q, n, D);
  write_through_unit(p, s, room.product, room.k, room.k_inverse, tau, r, grad + channels);
  over_columns(room, s, room.ds, room.k, n, D);
  return write_through_unit(p, s, room.product, room.q, room.q_inverse, tau, r, grad);
}

}  // namespace

void window_attention_backward(const WindowAttentionBackward& call, int threads) {
  const WindowAttentionProblem& p = call.problem;
  const Shape s = shape_of(p);
  const bool empty = p.width == 0 || p.batch * p.rows * p.columns == 0;
  const int64_t tasks = empty ? 0 : p.heads * s.blocks;
  // Sums of a task: the bias table, and behind it the gradient of tau.
  const int64_t sums = s.offsets + 1;
  Scratch partial(tasks * sums);
  Rooms none;
  const int64_t room = lay_out(s, p.width, nullptr, &none);
  parallel_for(tasks, 1, threads, [&](int64_t begin, int64_t end, int) {
    Scratch scratch(room);
    Rooms rooms;
    lay_out(s, p.width, scratch.data, &rooms);
    int64_t expanded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / s.blocks, first = task % s.blocks * WINDOWS;
      if (head != expanded) expand_bias(p, s, expanded = head, rooms.whole);
      for (int64_t i = 0; i < s.positions * s.stride; ++i) rooms.pairs[i] = 0;
      double tau = 0;
      for (int64_t w = first; w < smaller(first + WINDOWS, p.batch * s.windows); ++w) {
        const Regions regions = regions_of(p, w % s.windows);
        for (int k = 0; k < regions.count; ++k) tau += attend(call, s, rooms, w / s.windows, head, regions.part[k]);
      }
      float* to = partial.data + task * sums;
      for (int64_t i = 0; i < sums; ++i) to[i] = 0;
      for (int64_t i = 0; i < s.positions; ++i)
        for (int64_t v = 0; v < p.window_rows; ++v) {
          const float* run = rooms.pairs + i * s.stride + v * p.window_columns;
          float* at = to + offset_of(p, i / p.window_columns, i % p.window_columns, v, 0);
          for (int64_t u = 0; u < p.window_columns; ++u) at[-u] += run[u];
        }
      to[s.offsets] = static_cast<float>(tau);
    }
  });
  for (int64_t head = 0; head < p.heads; ++head)
    for (int64_t i = 0; i < sums; ++i) {
      double total = 0;
      for (int64_t block = 0; block < (empty ? 0 : s.blocks); ++block)
        total += static_cast<double>(partial.data[(head * s.blocks + block) * sums + i]);
      (i < s.offsets ? call.dbias_table[i * p.heads + head] : call.dtau[head]) = static_cast<float>(total);
    }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
