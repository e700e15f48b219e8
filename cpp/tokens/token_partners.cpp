// The most similar destination of every source token. Compiled once per level.
//
// Work is (batch, block of sources). A worker keeps the packed destinations of the last sequence it met.
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "tokens/token_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t BLOCK_SOURCES = 4 * MR;

struct Plan {
  const TokenMatch& call;
  int64_t sources, destinations, blocks, tiles, tile_floats;
  const float* rows;     // the metric without heads
  int64_t batch_stride, row_stride;
  const float* inverse;  // [batch, length]: 1 / norm, 0 for a zero row
};

struct Worker {
  int64_t batch;   // whose destinations are packed, -1 for none
  float *packed;   // [tiles] of [width * BC]
  float *scale;    // [tiles * BC]: 1 / norm of the destinations, -0 beyond
  float *query;    // [BLOCK_SOURCES, width] in groups of MR
  float *scores;   // [MR, LDS]

  static int64_t room(const Plan& s) {
    return s.tiles * (s.tile_floats + BC) + round_up(packed_rows_room(BLOCK_SOURCES, s.call.width), W) + MR * LDS;
  }
  static Worker make(const Plan& s, float* at) {
    Worker w;
    w.batch = -1;
    w.packed = at;
    w.scale = w.packed + s.tiles * s.tile_floats;
    w.query = w.scale + s.tiles * BC;
    w.scores = w.query + round_up(packed_rows_room(BLOCK_SOURCES, s.call.width), W);
    return w;
  }
};

// Strictly greater wins, so that the lowest index of equals stays, and NaN never wins.
struct Leader {
  vf value;
  vi index;
};

VLM_INLINE void follow(const float* scores, const float* scale, int64_t n, int64_t j0, int64_t first, Leader& leader) {
  for (int64_t c = 0; c < n; c += W) {
    const vi lane = lane_numbers() + static_cast<int32_t>(j0 + c);
    const vf cosine = load(scores + c) * load(scale + c);
    const vi there = (lane >= static_cast<int32_t>(first)) & (lane < static_cast<int32_t>(j0 + n));
    const vi better = (cosine > leader.value) & there;
    leader.value = select(better, cosine, leader.value);
    leader.index = better ? lane : leader.index;
  }
}

void run_block(const Plan& s, Worker& w, int64_t b, int64_t block, float* best, int32_t* partner) {
  const TokenMatch& c = s.call;
  const float* rows = s.rows + b * s.batch_stride;
  const float* inverse = s.inverse + b * c.length;
  const int64_t i0 = block * BLOCK_SOURCES, count = smaller(BLOCK_SOURCES, s.sources - i0);
  const int64_t first = c.protect / 2;  // protected destinations come first
  if (w.batch != b) {
    w.batch = b;
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int64_t j0 = tile * BC, n = smaller(BC, s.destinations - j0);
      pack_transposed(rows + (2 * j0 + 1) * s.row_stride, 2 * s.row_stride, n, c.width, nullptr,
                      w.packed + tile * s.tile_floats);
      for (int64_t j = 0; j < BC; ++j) w.scale[j0 + j] = j < n ? inverse[2 * (j0 + j) + 1] : 0.0f;
    }
  }
  pack_rows(rows + 2 * i0 * s.row_stride, 2 * s.row_stride, count, c.width, 1.0f, w.query);
  for (int64_t g = 0; g < count; g += MR) {
    const int64_t height = smaller(MR, count - g);
    Leader leaders[MR];
    for (int r = 0; r < MR; ++r) leaders[r] = Leader{splat(-infinity), splat_int(-1)};
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int64_t j0 = tile * BC, n = smaller(BC, s.destinations - j0);
      multiply<PackedRows>(height, n, c.width, w.query + g * c.width, 0, w.packed + tile * s.tile_floats, NR * c.width,
                           w.scores, LDS, false);
      for (int64_t r = 0; r < height; ++r) follow(w.scores + r * LDS, w.scale + j0, n, j0, first, leaders[r]);
    }
    for (int64_t r = 0; r < height; ++r) {
      float top = -infinity;
      int32_t index = -1;
      for (int l = 0; l < W; ++l) {
        const float value = leaders[r].value[l];
        const int32_t lane = leaders[r].index[l];
        if (lane >= 0 && (value > top || (value == top && lane < index))) {
          top = value;
          index = lane;
        }
      }
      const int64_t a = i0 + g + r;
      const float cosine = top * inverse[2 * a];
      best[b * s.sources + a] = cosine == cosine ? cosine : -infinity;
      partner[b * s.sources + a] = index >= 0 ? index : static_cast<int32_t>(first);
    }
  }
}

// 1 / max(norm, 1e-12) of every token; with heads, their mean is laid down in `mean` first.
void prepare(const TokenMatch& c, float* mean, float* inverse, int threads) {
  const float share = 1.0f / static_cast<float>(c.heads);
  parallel_for(c.batch * c.length, 64, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t at = begin; at < end; ++at) {
      const float* row = c.metric + at / c.length * c.batch_stride + at % c.length * c.row_stride;
      vf squares{};
      for (int64_t e = 0; e < c.width; e += W) {
        const int64_t n = c.width - e;
        vf value = load_first(row + e, n);
        if (c.heads > 1) {
          for (int64_t h = 1; h < c.heads; ++h) value += load_first(row + h * c.head_stride + e, n);
          value *= share;
          store_first(mean + at * c.width + e, value, n);
        }
        squares += value * value;
      }
      const float norm = __builtin_sqrtf(sum_lanes(squares));
      inverse[at] = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
    }
  });
}

}  // namespace

void token_partners(const TokenMatch& call, float* best, int32_t* partner, int threads) {
  const int64_t sources = (call.length + 1) / 2, destinations = call.length / 2;
  const bool averaged = call.heads > 1;
  if (static_cast<double>(call.batch) * sources * destinations * call.width < 1e6) threads = 1;
  Scratch inverse(call.batch * call.length), mean(averaged ? call.batch * call.length * call.width : 0);
  prepare(call, mean.data, inverse.data, threads);
  const Plan plan{call,
                  sources,
                  destinations,
                  (sources + BLOCK_SOURCES - 1) / BLOCK_SOURCES,
                  (destinations + BC - 1) / BC,
                  call.width * BC,
                  averaged ? mean.data : call.metric,
                  averaged ? call.length * call.width : call.batch_stride,
                  averaged ? call.width : call.row_stride,
                  inverse.data};
  const int64_t room = round_up(Worker::room(plan), W);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(Worker) / sizeof(float) + 1));
  Worker* workers = reinterpret_cast<Worker*>(owners.data);
  for (int t = 0; t < threads; ++t) workers[t] = Worker::make(plan, memory.data + t * room);
  const int64_t total = call.batch * plan.blocks;
  const int64_t grain = larger(1, smaller(plan.blocks, (total + 4 * threads - 1) / (4 * threads)));
  parallel_for(total, grain, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task)
      run_block(plan, workers[worker], task / plan.blocks, task % plan.blocks, best, partner);
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
