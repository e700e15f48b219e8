// Exact attention backward: probabilities are recomputed from lse, tile by tile. Compiled once per level.
//
// A task is (owner, chunk of key tiles). It owns dK and dV of its keys, and the rows of dQ either outright (one chunk)
// or as a partial sum, merged in chunk order. An owner is one (batch, key head), or several where the bias gradient is
// summed over batch or heads, so that every output has one writer: no atomics, bits independent of threads.
// Five tile products for each tile: S, dP, dV, dK, dQ.
#include "attention/attention_kernels.hpp"
#include "attention/attention_tiles.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t BLOCK_QUERIES = W == 16 ? 8 * MR : 16 * MR;
constexpr int64_t WANTED_TASKS = 16;
constexpr int64_t TILE_QUERIES = ROUNDS ? MR : BLOCK_QUERIES;  // rows of a score tile before it is rounded

struct Plan {
  const AttentionBackward& call;
  const AttentionProblem& p;
  KeyMasks masks;
  InverseLengths lengths;
  int64_t group;
  bool bias_matrix, bias_columns;      // how the bias gradient is collected: by tile, or as column sums
  int64_t owner_batches, owner_heads;  // owners; 1 where several members share one
  int64_t chunks, chunk_tiles;
  int64_t width, value_width;          // rounded up to W: row strides of accumulators
  float* column_sums;                  // [batch, query_heads, keys]
  float* dq_parts;                     // [chunks, batch, query_heads, queries, width], if chunks > 1
  uint8_t* dq_touched;                 // [chunks, batch, query_heads, query blocks]: whether that part was written
  float* relative_parts;               // [batch, query_heads, chunks, relative], if wanted
  int64_t relative;                    // numbers of a head
  const float *top, *log_sum;          // of each row, instead of lse; null = lse is exact enough

  Plan(const AttentionBackward& c, int threads)
      : call(c), p(c.problem), masks(c.problem), lengths(c.problem, threads), group(p.query_heads / p.key_heads) {
    bias_columns = call.dbias != nullptr && call.bias_rows == 1;
    bias_matrix = call.dbias != nullptr && !bias_columns;
    owner_batches = bias_matrix && call.bias_batch == 1 ? 1 : p.batch;
    owner_heads = bias_matrix && call.bias_heads == 1 ? 1 : p.key_heads;
    const int64_t owners = larger(1, owner_batches * owner_heads);
    chunks = larger(1, smaller(masks.tiles, (WANTED_TASKS + owners - 1) / owners));
    chunk_tiles = (masks.tiles + chunks - 1) / chunks;
    if (chunk_tiles > 0) chunks = larger(1, (masks.tiles + chunk_tiles - 1) / chunk_tiles);
    width = round_up(larger(p.width, 1), W);
    value_width = round_up(larger(p.value_width, 1), W);
    column_sums = dq_parts = relative_parts = nullptr;
    top = log_sum = nullptr;
    dq_touched = nullptr;
    relative = call.drelative == nullptr ? 0 : relative_length(p);
  }
  int64_t column_room() const { return bias_columns ? p.batch * p.query_heads * p.keys : 0; }
  int64_t query_blocks() const { return (p.queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES; }
  int64_t touched_room() const { return chunks * p.batch * p.query_heads * query_blocks() / 4 + 1; }
  uint8_t* touched(int64_t chunk, int64_t b, int64_t h) const {
    return dq_touched + ((chunk * p.batch + b) * p.query_heads + h) * query_blocks();
  }
  int64_t relative_room() const { return p.batch * p.query_heads * chunks * relative; }
  float* relative_part(int64_t b, int64_t h, int64_t chunk) const {
    return relative_parts == nullptr ? nullptr : relative_parts + ((b * p.query_heads + h) * chunks + chunk) * relative;
  }
  int64_t part_room() const { return p.batch * p.query_heads * p.queries * width; }
};

// What one worker owns.
struct Worker {
  float *keys, *values, *plain_keys;         // of the chunk: k^T and v^T panels, k panels, for each tile
  float *dk, *dv;                            // of the chunk, [tiles * BC, width], [tiles * BC, value_width]
  float *query, *dout;                       // of a query block, in groups of MR
  float *plain_query, *plain_dout;           // the same as panels
  float *dq;                                 // [BLOCK_QUERIES, width]
  float *weights, *gradients;                // score tiles P and dS, [TILE_QUERIES, LDS]
  float *weight_columns, *gradient_columns;  // the same of the whole block as left operands, where those are copies
  float *gradient_rows;
  float *lse, *rest, *delta;                 // [BLOCK_QUERIES]; P = 2^(score - lse - rest)
  float *slope;                              // [BC], derivative of the cap
  float *row_factor;                         // [BLOCK_QUERIES], for the cosine
  uint8_t* packed;                           // [chunk tiles]

  // Walks the layout; with at = nullptr it only measures.
  static int64_t lay_out(const Plan& s, Worker* w, float* at) {
    int64_t used = 0;
    const auto take = [&](float** slot, int64_t floats) {
      if (at != nullptr) *slot = at + used;
      used += round_up(floats, W);
    };
    const int64_t n = s.chunk_tiles, D = s.p.width, V = s.p.value_width;
    Worker unused;
    Worker& to = w == nullptr ? unused : *w;
    take(&to.keys, n * steps(D) * BC);
    take(&to.values, n * steps(V) * BC);
    take(&to.plain_keys, n * round_up(D, NR) * steps(BC));
    take(&to.dk, n * BC * s.width);
    take(&to.dv, n * BC * s.value_width);
    take(&to.query, BLOCK_QUERIES * steps(D));
    take(&to.dout, BLOCK_QUERIES * steps(V));
    take(&to.plain_query, steps(BLOCK_QUERIES) * round_up(D, NR));
    take(&to.plain_dout, steps(BLOCK_QUERIES) * round_up(V, NR));
    take(&to.dq, BLOCK_QUERIES * s.width);
    take(&to.weights, TILE_QUERIES * LDS);
    take(&to.gradients, TILE_QUERIES * LDS);
    take(&to.weight_columns, tile_columns_room(BLOCK_QUERIES));
    take(&to.gradient_columns, tile_columns_room(BLOCK_QUERIES));
    take(&to.gradient_rows, tile_rows_room(BLOCK_QUERIES));
    take(&to.lse, BLOCK_QUERIES);
    take(&to.rest, BLOCK_QUERIES);
    take(&to.delta, BLOCK_QUERIES);
    take(&to.slope, BC);
    take(&to.row_factor, BLOCK_QUERIES);
    float* flags = nullptr;
    take(&flags, n / 4 + 1);
    to.packed = reinterpret_cast<uint8_t*>(flags);
    return used;
  }
};

void fill(float* at, int64_t count) {
  for (int64_t e = 0; e < count; ++e) at[e] = 0.0f;
}

void need_tile(const Plan& s, Worker& w, int64_t b, int64_t key_head, int64_t first_tile, int64_t tile) {
  const AttentionProblem& p = s.p;
  const int64_t slot = tile - first_tile, j0 = tile * BC, n = smaller(BC, p.keys - j0);
  if (w.packed[slot]) return;
  const uint8_t* kept = s.masks.kept(b, j0);
  const Element* k = stored(p.k, b, key_head) + j0 * p.k.row_stride;
  const Element* v = stored(p.v, b, key_head) + j0 * p.v.row_stride;
  const float* lengths = s.lengths.of_keys(b, key_head, j0);
  pack_right_transposed(k, p.k.row_stride, n, p.width, kept, w.keys + slot * steps(p.width) * BC, lengths);
  pack_right_transposed(v, p.v.row_stride, n, p.value_width, kept, w.values + slot * steps(p.value_width) * BC);
  pack_right(k, p.k.row_stride, n, p.width, kept, w.plain_keys + slot * round_up(p.width, NR) * steps(BC),
             NR * steps(BC), lengths);
  w.packed[slot] = 1;
}

// Pack a block of queries and its upstream gradient; lse in units of log 2, delta_i = <dout_i, out_i> - dlse_i.
void load_queries(const Plan& s, Worker& w, int64_t b, int64_t h, int64_t i0, int64_t rows) {
  const AttentionProblem& p = s.p;
  const AttentionBackward& c = s.call;
  const Element* q = stored(p.q, b, h) + i0 * p.q.row_stride;
  const float* lengths = s.lengths.of_queries(b, h, i0);
  if (lengths != nullptr)  // heads of a group may differ in temperature: it goes into dK here
    for (int64_t r = 0; r < rows; ++r) w.row_factor[r] = lengths[r] * p.temperature[h * p.temperature_stride];
  const Element* dout = stored(c.dout, b, h) + i0 * c.dout.row_stride;
  const Element* out = stored(c.out, b, h) + i0 * c.out.row_stride;
  pack_left(q, p.q.row_stride, rows, p.width, scale_of(p, h) * log2_e, w.query, lengths);
  pack_left(dout, c.dout.row_stride, rows, p.value_width, 1.0f, w.dout);
  pack_right(q, p.q.row_stride, rows, p.width, nullptr, w.plain_query, NR * steps(BLOCK_QUERIES),
             lengths == nullptr ? nullptr : w.row_factor);
  pack_right(dout, c.dout.row_stride, rows, p.value_width, nullptr, w.plain_dout, NR * steps(BLOCK_QUERIES));
  const int64_t at = (b * p.query_heads + h) * p.queries + i0;
  for (int64_t r = 0; r < rows; ++r) {
    vf sum{};
    for (int64_t e = 0; e < p.value_width; e += W)
      sum += load_first(dout + r * c.dout.row_stride + e, p.value_width - e) *
             load_first(out + r * c.out.row_stride + e, p.value_width - e);
    w.delta[r] = sum_lanes(sum) - (c.dlse == nullptr ? 0.0f : c.dlse[at + r]);
    w.lse[r] = c.lse[at + r] == -infinity ? infinity : c.lse[at + r] * log2_e;
    w.rest[r] = 0.0f;
    if (c.lse[at + r] == -infinity) {
      w.delta[r] = 0.0f;
    } else if (s.top != nullptr) {
      w.lse[r] = s.top[at + r];
      w.rest[r] = s.log_sum[at + r];
    }
  }
}

void collect_bias(const Plan& s, const float* gradients, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n) {
  const AttentionBackward& c = s.call;
  float* to = s.bias_columns ? s.column_sums + (b * s.p.query_heads + h) * s.p.keys
                             : c.dbias + (((c.bias_batch == 1 ? 0 : b) * c.bias_heads + (c.bias_heads == 1 ? 0 : h)) *
                                              c.bias_rows +
                                          i) *
                                             s.p.keys;
  to += j0;
  for (int64_t e = 0; e < n; e += W) store_first(to + e, load_first(to + e, n - e) + load(gradients + e), n - e);
}

void clear(float* row, int64_t from, int64_t to) {
  for (int64_t c = from; c < to; c += W) store(row + c, vf{});
}

// What one row of dS gives to the bias of its relative position.
void collect_relative(const AttentionProgram& program, const float* gradients, int64_t n, int64_t i, int64_t j0,
                      float* to) {
  program.walk_relative(i, j0, n, [&](int64_t column, int64_t at, int64_t count) {
    for (int64_t c = 0; c < count; ++c) to[at + c] += gradients[column + c];
  });
}

// P (dropped, for dV) and the gradient of the product q k (for dQ and dK) of a group of queries and a tile, in the
// columns that any query of the block sees. The gradients of the biases are taken on the way, before the slope of the
// cap.
void score_group(const Plan& s, Worker& w, const AttentionProgram& program, Cover cover, int64_t b, int64_t h,
                 int64_t i0, int64_t g, int64_t height, int64_t chunk, int64_t slot, int64_t tile, int64_t breadth,
                 Columns block, float* weights, float* gradients) {
  const AttentionProblem& p = s.p;
  const int64_t j0 = tile * BC;
  float* relative = s.relative_part(b, h, chunk);
  const Columns seen = program.columns(i0 + g, i0 + g + height, j0, breadth, tile);
  const int64_t n = seen.last - seen.first, j = j0 + seen.first;
  Cover group = n == 0 ? Cover::skip : cover;
  if (group == Cover::partial) group = program.cover(i0 + g, i0 + g + height, j, j + n, tile);
  if (group == Cover::skip) {
    for (int64_t r = 0; r < height; ++r) {
      clear(weights + r * LDS, block.first, block.last);
      clear(gradients + r * LDS, block.first, block.last);
    }
    return;
  }
  multiply_packed(height, n, p.width, w.query + g * steps(p.width),
                  w.keys + (slot * BC + seen.first) * steps(p.width), weights + seen.first, scale_of(p, h) * log2_e);
  multiply_packed(height, n, p.value_width, w.dout + g * steps(p.value_width),
                  w.values + (slot * BC + seen.first) * steps(p.value_width), gradients + seen.first, 1.0f);
  for (int64_t r = 0; r < height; ++r, weights += LDS, gradients += LDS) {
    const int64_t i = i0 + g + r, padded = round_up(n, W);
    float *row = weights + seen.first, *slope = gradients + seen.first;
    finish_scores(row, n, bias_row(p.bias, b, h, i, j), program, group, i, j, w.slope);
    const vf lse = splat(w.lse[g + r]), rest = splat(w.rest[g + r]), delta = splat(w.delta[g + r]);
    if (program.drop_below == 0) {
      for (int64_t c = 0; c < padded; c += W) {
        const vf weight = exp2(load(row + c) - lse - rest);
        store(row + c, weight);
        store(slope + c, weight * (load(slope + c) - delta));
      }
    } else {
      const uint32_t key = row_key(program.drop_key, i);
      for (int64_t c = 0; c < padded; c += W) {
        const vi kept = kept_lanes(key, j + c, program.drop_below);
        const vf weight = exp2(load(row + c) - lse - rest), factor = select(kept, splat(program.drop_scale), vf{});
        store(row + c, weight * factor);
        store(slope + c, weight * (load(slope + c) * factor - delta));
      }
    }
    if (s.call.dbias != nullptr) collect_bias(s, slope, b, h, i, j, n);
    if (relative != nullptr) collect_relative(program, slope, n, i, j, relative);
    if (program.softcap != 0.0f)
      for (int64_t c = 0; c < padded; c += W) store(slope + c, load(slope + c) * load(w.slope + c));
    clear(weights, block.first, seen.first);
    clear(gradients, block.first, seen.first);
    clear(weights, seen.first + padded, block.last);
    clear(gradients, seen.first + padded, block.last);
  }
}

// The same of all groups, and what the products with it need.
void score_tile(const Plan& s, Worker& w, const AttentionProgram& program, Cover cover, int64_t b, int64_t h,
                int64_t i0, int64_t rows, int64_t chunk, int64_t slot, int64_t tile, int64_t breadth, Columns block) {
  for (int64_t g = 0; g < rows; g += MR) {
    const int64_t height = smaller(MR, rows - g), n = block.last - block.first, at = ROUNDS ? 0 : g * LDS;
    float *weights = w.weights + at, *gradients = w.gradients + at;
    score_group(s, w, program, cover, b, h, i0, g, height, chunk, slot, tile, breadth, block, weights, gradients);
    if (!ROUNDS) continue;
    as_columns(weights + block.first, height, n, w.weight_columns + g / 2 * LDS);
    as_columns(gradients + block.first, height, n, w.gradient_columns + g / 2 * LDS);
    as_rows(gradients + block.first, height, n, w.gradient_rows + g * (LDS / 2));
  }
}

void run_head(const Plan& s, Worker& w, int64_t b, int64_t key_head, int64_t chunk) {
  const AttentionProblem& p = s.p;
  const int64_t first_tile = chunk * s.chunk_tiles, last_tile = smaller(first_tile + s.chunk_tiles, s.masks.tiles);
  const int64_t first_key = first_tile * BC, keys = smaller(last_tile * BC, p.keys) - first_key;
  for (int64_t t = first_tile; t < last_tile; ++t) w.packed[t - first_tile] = 0;
  fill(w.dk, larger(keys, 0) * s.width);
  fill(w.dv, larger(keys, 0) * s.value_width);
  for (int64_t h = key_head * s.group; h < (key_head + 1) * s.group; ++h) {
    const AttentionProgram program = s.masks.program(p, b, h);
    for (int64_t i0 = 0; i0 < p.queries; i0 += BLOCK_QUERIES) {
      const int64_t rows = smaller(BLOCK_QUERIES, p.queries - i0);
      bool loaded = false;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t j0 = tile * BC, breadth = smaller(BC, p.keys - j0), slot = tile - first_tile;
        const Cover cover = program.cover(i0, i0 + rows, j0, j0 + breadth, tile);
        if (cover == Cover::skip) continue;
        const Columns seen = program.columns(i0, i0 + rows, j0, breadth, tile);
        const int64_t n = seen.last - seen.first;
        if (n == 0) continue;
        if (!loaded) {
          load_queries(s, w, b, h, i0, rows);
          fill(w.dq, rows * s.width);
        }
        loaded = true;
        need_tile(s, w, b, key_head, first_tile, tile);
        score_tile(s, w, program, cover, b, h, i0, rows, chunk, slot, tile, breadth, seen);
        // Rounded operands begin at the first column that is seen.
        const float* weight_columns = ROUNDS ? w.weight_columns : w.weights + seen.first;
        const float* gradient_columns = ROUNDS ? w.gradient_columns : w.gradients + seen.first;
        const float* gradient_rows = ROUNDS ? w.gradient_rows : w.gradients + seen.first;
        multiply_columns(n, p.value_width, rows, weight_columns, w.plain_dout, NR * steps(BLOCK_QUERIES),
                         w.dv + (slot * BC + seen.first) * s.value_width, s.value_width, true);
        multiply_columns(n, p.width, rows, gradient_columns, w.plain_query, NR * steps(BLOCK_QUERIES),
                         w.dk + (slot * BC + seen.first) * s.width, s.width, true);
        multiply_rows(rows, p.width, n, gradient_rows,
                      w.plain_keys + slot * round_up(p.width, NR) * steps(BC) + steps(seen.first) * NR, NR * steps(BC),
                      w.dq, s.width, true);
      }
      if (s.chunks > 1) {
        s.touched(chunk, b, h)[i0 / BLOCK_QUERIES] = loaded;
        if (!loaded) continue;
        float* to = s.dq_parts + chunk * s.part_room() + ((b * p.query_heads + h) * p.queries + i0) * s.width;
        for (int64_t e = 0; e < rows * s.width; e += W) store(to + e, load(w.dq + e));
      } else {
        if (!loaded) fill(w.dq, rows * s.width);
        Element* to = stored(s.call.dq, b, h) + i0 * s.call.dq.row_stride;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t e = 0; e < p.width; e += W)
            store_first(to + r * s.call.dq.row_stride + e, load(w.dq + r * s.width + e) * p.scale, p.width - e);
      }
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Element* dk = stored(s.call.dk, b, key_head) + (first_key + j) * s.call.dk.row_stride;
    for (int64_t e = 0; e < p.width; e += W)
      store_first(dk + e, load(w.dk + j * s.width + e) * p.scale, p.width - e);
    Element* dv = stored(s.call.dv, b, key_head) + (first_key + j) * s.call.dv.row_stride;
    for (int64_t e = 0; e < p.value_width; e += W)
      store_first(dv + e, load(w.dv + j * s.value_width + e), p.value_width - e);
  }
}

void merge_queries(const Plan& s, int threads) {
  const AttentionProblem& p = s.p;
  parallel_for(p.batch * p.query_heads * p.queries, 64, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at % p.queries, head = at / p.queries;
      Element* to = stored(s.call.dq, head / p.query_heads, head % p.query_heads) + i * s.call.dq.row_stride;
      for (int64_t e = 0; e < p.width; e += W) {
        vf sum{};
        for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
          if (!s.touched(chunk, head / p.query_heads, head % p.query_heads)[i / BLOCK_QUERIES]) continue;
          sum += load(s.dq_parts + chunk * s.part_room() + at * s.width + e);
        }
        store_first(to + e, sum * p.scale, p.width - e);
      }
    }
  });
}

// From the gradient g of a unit vector x / |x| to that of x, times a factor: (g - u <u, g>) factor / |x|. Returns
// <u, g>.
float through_length(const Element* x, float inverse, int64_t width, float factor, Element* g) {
  vf sum{};
  for (int64_t e = 0; e < width; e += W) sum += load_first(x + e, width - e) * load_first(g + e, width - e);
  const float along = sum_lanes(sum) * inverse;
  for (int64_t e = 0; e < width; e += W) {
    const vf unit = load_first(x + e, width - e) * inverse;
    store_first(g + e, (load_first(g + e, width - e) - unit * along) * (inverse * factor), width - e);
  }
  return along;
}

// The cosine score: dQ and dK so far are those of unit vectors, dQ without the temperature. So the temperature's
// gradient is <u_i, g_i> summed over queries and, in this order, over batch and heads, also where it is 0.
void finish_cosine(const Plan& s, int threads) {
  const AttentionProblem& p = s.p;
  Scratch memory(2 * p.batch * p.query_heads);
  double* sums = reinterpret_cast<double*>(memory.data);
  parallel_for(p.batch * p.query_heads, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / p.query_heads, h = at % p.query_heads;
      const Element* q = stored(p.q, b, h);
      const float* inverse = s.lengths.of_queries(b, h, 0);
      const float temperature = p.temperature[h * p.temperature_stride];
      Element* dq = stored(s.call.dq, b, h);
      sums[at] = 0.0;
      for (int64_t i = 0; i < p.queries; ++i)
        sums[at] += static_cast<double>(
            through_length(q + i * p.q.row_stride, inverse[i], p.width, temperature, dq + i * s.call.dq.row_stride));
    }
  });
  parallel_for(p.batch * p.key_heads, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / p.key_heads, h = at % p.key_heads;
      const Element* k = stored(p.k, b, h);
      const float* inverse = s.lengths.of_keys(b, h, 0);
      const uint8_t* kept = s.masks.kept(b, 0);
      Element* dk = stored(s.call.dk, b, h);
      for (int64_t j = 0; j < p.keys; ++j)
        if (kept == nullptr || kept[j] != 0)
          through_length(k + j * p.k.row_stride, inverse[j], p.width, 1.0f, dk + j * s.call.dk.row_stride);
    }
  });
  if (s.call.dtemperature == nullptr) return;
  const bool shared = p.temperature_stride == 0;
  for (int64_t head = 0; head < (shared ? 1 : p.query_heads); ++head) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = head; h < (shared ? p.query_heads : head + 1); ++h) sum += sums[b * p.query_heads + h];
    s.call.dtemperature[head] = static_cast<float>(sum);
  }
}

// The gradient of each relative position: over batch, chunks, and heads if they share it, always in this order.
void merge_relative(const Plan& s) {
  const AttentionProblem& p = s.p;
  const bool shared = p.relative_head_stride == 0;
  for (int64_t head = 0; head < (shared ? 1 : p.query_heads); ++head)
    for (int64_t e = 0; e < s.relative; ++e) {
      double sum = 0.0;
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = head; h < (shared ? p.query_heads : head + 1); ++h)
          for (int64_t chunk = 0; chunk < s.chunks; ++chunk)
            sum += static_cast<double>(s.relative_part(b, h, chunk)[e]);
      s.call.drelative[head * s.relative + e] = static_cast<float>(sum);
    }
}

void merge_columns(const Plan& s) {
  const AttentionProblem& p = s.p;
  const AttentionBackward& c = s.call;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < p.query_heads; ++h) {
      float* to = c.dbias + ((c.bias_batch == 1 ? 0 : b) * c.bias_heads + (c.bias_heads == 1 ? 0 : h)) * p.keys;
      const float* from = s.column_sums + (b * p.query_heads + h) * p.keys;
      for (int64_t j = 0; j < p.keys; ++j) to[j] += from[j];
    }
}

}  // namespace

void attention_backward(const AttentionBackward& call, int threads) {
  threads = useful_threads(call.problem, threads);
  Plan plan(call, threads);
  const AttentionProblem& p = plan.p;
  Scratch columns(plan.column_room()), parts(plan.chunks > 1 ? plan.chunks * plan.part_room() : 0);
  plan.column_sums = columns.data;
  plan.dq_parts = parts.data;
  const int64_t lse_count = p.batch * p.query_heads * p.queries;
  const bool split = needs_split(p, call.lse);
  Scratch halves(split ? 3 * lse_count : 0);
  if (split) {
    AttentionForward again{p, call.dq, halves.data};
    again.problem.value_width = 0;  // writes no output
    again.top = halves.data + lse_count;
    again.log_sum = halves.data + 2 * lse_count;
    VLM_LEVEL::attention_forward(again, threads);
    plan.top = again.top;
    plan.log_sum = again.log_sum;
  }
  Scratch touched(plan.chunks > 1 ? plan.touched_room() : 0), relative(plan.relative_room());
  plan.dq_touched = reinterpret_cast<uint8_t*>(touched.data);
  if (call.drelative != nullptr) plan.relative_parts = relative.data;
  fill(relative.data, plan.relative_room());
  fill(columns.data, plan.column_room());
  if (call.dbias != nullptr) fill(call.dbias, call.bias_batch * call.bias_heads * call.bias_rows * p.keys);

  const int64_t room = Worker::lay_out(plan, nullptr, nullptr);
  Scratch memory(threads * room), owners(threads * static_cast<int64_t>(sizeof(Worker) / sizeof(float) + 1));
  Worker* workers = reinterpret_cast<Worker*>(owners.data);
  for (int t = 0; t < threads; ++t) Worker::lay_out(plan, workers + t, memory.data + t * room);
  const int64_t member_batches = plan.owner_batches == p.batch ? 1 : p.batch;
  const int64_t member_heads = plan.owner_heads == p.key_heads ? 1 : p.key_heads;
  parallel_for(plan.owner_batches * plan.owner_heads * plan.chunks, 1, threads, [&](int64_t task, int64_t, int worker) {
    const int64_t chunk = task % plan.chunks, owner = task / plan.chunks;
    const int64_t b0 = owner / plan.owner_heads, h0 = owner % plan.owner_heads;
    for (int64_t b = b0; b < b0 + member_batches; ++b)
      for (int64_t h = h0; h < h0 + member_heads; ++h) run_head(plan, workers[worker], b, h, chunk);
  });
  if (plan.chunks > 1) merge_queries(plan, threads);
  if (plan.bias_columns) merge_columns(plan);
  if (call.drelative != nullptr) merge_relative(plan);
  if (p.temperature != nullptr) finish_cosine(plan, threads);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
