// Block memory of one row. Chunks follow one another, since representatives hang on the weights given before. Within a
// chunk keys and values are packed once for all query heads that share them, then the heads go their own ways; the scores
// of few rows are held whole, so that the weights that are summed for the representatives have their final size.
// Compiled once per level.
#include "selection/block_memory_chunk.hpp"

#include "core/vector_math.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Far keys first, then the window, each in tiles of BC keys of which the last may be smaller.
struct Tiles {
  int64_t far, near;
};
VLM_INLINE int64_t tiles_of(int64_t keys) { return (keys + BC - 1) / BC; }
VLM_INLINE Tiles tiles_of(const Chunk& k) { return {tiles_of(k.far), tiles_of(k.near)}; }

struct Area {
  int64_t first, last;  // columns of a tile that were multiplied
};

struct Plan {
  const BlockMemoryForward& c;
  int threads;
  int64_t group;           // query heads of a key head
  int64_t together;        // of them, those whose rows a task stacks: all where a chunk is short
  int64_t at_once;         // key heads whose keys are packed at a time
  int64_t most_blocks, most_far, most_tiles;
  int64_t key_tile, value_tile, row_stride, out_stride;
  int32_t *places, *order, *best;  // of the chunk; order and best also of each head that forms blocks
  float *queries, *scores, *packed, *workers;
  int64_t ranks, query_room, area_room, worker_room;

  Plan(const BlockMemoryForward& call, int at_most) : c(call) {
    const int64_t near = smaller(c.keys, c.window + c.chunk);
    most_blocks = c.formed + c.more;
    most_far = smaller(c.keys, c.first_tokens + c.topk * c.block + c.block + c.chunk);
    most_tiles = tiles_of(most_far) + tiles_of(near);
    const double work = static_cast<double>(c.heads) * c.width * (2.0 * c.queries * (most_far + near) + most_blocks);
    threads = work < 2e6 ? 1 : at_most;
    group = larger(1, c.heads / c.key_heads);
    together = group * c.chunk <= 2 * MR ? group : 1;
    at_once = smaller(c.key_heads, larger(1, (2 * threads * together + group - 1) / group));
    row_stride = round_up(larger(c.width, 1), W);
    out_stride = row_stride;
    key_tile = BC * c.width;
    value_tile = BC * round_up(c.width, NR);
    ranks = round_up(larger(most_blocks, c.block) + W, NR);
  }
  int64_t room(float* at) {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats + 1, NR);
      return place;
    };
    places = reinterpret_cast<int32_t*>(take(most_far));
    order = reinterpret_cast<int32_t*>(take(threads * ranks));
    best = reinterpret_cast<int32_t*>(take(threads * ranks));
    queries = take(c.heads * row_stride);
    scores = take(most_blocks);
    packed = take(at_once * most_tiles * (key_tile + value_tile));
    query_room = round_up(packed_rows_room(MR, c.width), W);
    area_room = round_up(most_tiles * static_cast<int64_t>(sizeof(Area) / sizeof(float)), NR);
    worker_room = round_up(BC * row_stride + most_tiles * MR * LDS + MR * out_stride + 2 * query_room + MR, NR) + area_room;
    workers = take(threads * worker_room);
    return used;
  }
  float* keys_at(int64_t slot, int64_t tile) const {
    return packed + (slot * most_tiles + tile) * (key_tile + value_tile);
  }
  float* values_at(int64_t slot, int64_t tile) const { return keys_at(slot, tile) + key_tile; }
};

struct Worker {
  float* rows;            // [BC, row_stride]: rows to be packed
  float *near, *far;      // packed queries [MR, width]
  float *out, *inverse;   // [MR, out_stride], [MR]
  float* scores;          // [tiles][MR, LDS]
  Area* areas;            // [tiles]
  Worker(const Plan& s, int number) {
    rows = s.workers + number * s.worker_room;
    scores = rows + BC * s.row_stride;
    out = scores + s.most_tiles * MR * LDS;
    near = out + MR * s.out_stride;
    far = near + s.query_room;
    inverse = far + s.query_room;
    areas = reinterpret_cast<Area*>(s.workers + (number + 1) * s.worker_room - s.area_room);
  }
};

// Representatives, the lookup, and the list of far keys.
void choose(const Plan& s, const Chunk& k, int64_t formed, int32_t* chosen) {
  const BlockMemoryForward& c = s.c;
  const bool looks = k.blocks > k.chosen && k.chosen > 0;
  if (looks || k.blocks > formed)
    parallel_for(c.heads, 1, s.threads, [&](int64_t begin, int64_t end, int worker) {
      const Worker w(s, worker);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t block = formed; block < k.blocks; ++block)
          form_block(c, head, block, s.order + worker * s.ranks, s.best + worker * s.ranks);
        if (looks) mean_query(c, k, head, w.rows, s.queries + head * s.row_stride);
      }
    });
  if (looks) {
    parallel_for(k.blocks, 64, s.threads,
                 [&](int64_t begin, int64_t end, int) { score_blocks(c, s.queries, begin, end, s.scores); });
    best_places(s.scores, k.blocks, k.chosen, s.order, chosen);
  } else {
    for (int64_t i = 0; i < k.chosen; ++i) chosen[i] = static_cast<int32_t>(i);
  }
  for (int64_t i = k.chosen; i < c.places; ++i) chosen[i] = -1;
  list_far(c, k, chosen, s.places);
}

void pack_tile(const Plan& s, const Chunk& k, const Worker& w, int64_t key_head, int64_t tile, float* keys,
               float* values) {
  const BlockMemoryForward& c = s.c;
  const Tiles tiles = tiles_of(k);
  const bool far = tile < tiles.far;
  const int64_t from = (far ? tile : tile - tiles.far) * BC, n = smaller(BC, (far ? k.far : k.near) - from);
  for (int64_t j = 0; j < n;) {  // runs of keys that follow one another in the store
    const int64_t place = far ? s.places[from + j] : k.gone + from;
    int64_t length = far ? 1 : n;
    while (far && j + length < n && s.places[from + j + length] == place + length) ++length;
    const float* source = row_of(c.k, key_head, place);
    pack_plain(row_of(c.v, key_head, place), c.v.row_stride, length, c.width, nullptr, values + j * NR, BC * NR);
    if (far && !c.absolute && length == n) {
      pack_transposed(source, c.k.row_stride, n, c.width, nullptr, keys);
      return;
    }
    for (int64_t i = 0; i < length; ++i) {
      float* to = w.rows + (j + i) * s.row_stride;
      const float* row = source + i * c.k.row_stride;
      if (far && !c.absolute)
        for (int64_t e = 0; e < c.width; e += W) store_first(to + e, load_first(row + e, c.width - e), c.width - e);
      else
        rotate(c, row, place + i - k.base, to);
    }
    j += length;
  }
  pack_transposed(w.rows, s.row_stride, n, c.width, nullptr, keys);
}

// Rows r0.. of the stacked rows of a task: row r is query r % n of head h0 + r / n.
struct Rows {
  int64_t h0, r0, count, slot;
};

void pack_queries(const Plan& s, const Chunk& k, const Worker& w, const Rows& rows) {
  const BlockMemoryForward& c = s.c;
  const float scale = c.scale * log2_e;
  for (int turn = 0; turn < (k.far > 0 ? 2 : 1); ++turn) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t head = rows.h0 + (rows.r0 + r) / k.n, query = (rows.r0 + r) % k.n;
      const int64_t position = turn == 0 || c.absolute ? k.start + query - k.base : c.window - 1;
      rotate(c, row_of(c.q, head, k.first + query), position, w.rows + r * s.row_stride);
    }
    pack_rows(w.rows, s.row_stride, rows.count, c.width, scale, turn == 0 ? w.near : w.far);
  }
}

// Scores of the rows in units of log 2, over the columns that one of them sees.
void multiply_tiles(const Plan& s, const Chunk& k, const Worker& w, const Rows& rows) {
  const Tiles tiles = tiles_of(k);
  const int64_t n = k.n, last_row = rows.r0 + rows.count - 1, d = s.c.width;
  const bool apart = rows.r0 / n != last_row / n;  // rows of several heads
  const int64_t first = apart ? 0 : rows.r0 % n, last = apart ? n - 1 : last_row % n;
  for (int64_t t = 0; t < tiles.far + tiles.near; ++t) {
    const int64_t from = (t < tiles.far ? t : t - tiles.far) * BC;
    Area area = t < tiles.far ? Area{0, far_seen(k, last)} : Area{near_from(s.c, k, first), near_to(k, last)};
    area.first = larger(0, area.first - from) / NR * NR;
    area.last = smaller(BC, area.last - from);
    if (area.first >= area.last) area = {0, 0};
    w.areas[t] = area;
    multiply<PackedRows>(rows.count, area.last - area.first, d, t < tiles.far ? w.far : w.near, 0,
                         s.keys_at(rows.slot, t) + area.first * d, NR * d, w.scores + t * MR * LDS + area.first, LDS,
                         false);
  }
}

// The scores of one row become weights; returns one over their sum.
float soften(const Plan& s, const Chunk& k, const Worker& w, int64_t r, int64_t query) {
  const Tiles tiles = tiles_of(k);
  vf top = splat(-infinity), total{};
  for (int64_t t = 0; t < tiles.far + tiles.near; ++t) {
    const Area area = w.areas[t];
    float* row = w.scores + (t * MR + r) * LDS;
    const int64_t from = (t < tiles.far ? t : t - tiles.far) * BC;
    const int64_t end = area.first + round_up(area.last - area.first, W);
    const int64_t low = t < tiles.far ? 0 : near_from(s.c, k, query) - from;
    const int64_t high = (t < tiles.far ? far_seen(k, query) : near_to(k, query)) - from;
    for (int64_t c = area.first; c < smaller(low, end); ++c) row[c] = -infinity;
    for (int64_t c = larger(area.first, smaller(high, area.last)); c < end; ++c) row[c] = -infinity;
    for (int64_t c = area.first; c < end; c += W) top = maximum(load(row + c), top);
  }
  const vf highest = splat(max_lanes(top));
  for (int64_t t = 0; t < tiles.far + tiles.near; ++t) {
    float* row = w.scores + (t * MR + r) * LDS;
    for (int64_t c = w.areas[t].first; c < w.areas[t].last; c += W) {
      const vf weight = exp2(load(row + c) - highest);
      store(row + c, weight);
      total += weight;
    }
  }
  return 1.0f / sum_lanes(total);
}

// What the keys of the window were given by `count` rows of one head, from row r on.
void add_shares(const Plan& s, const Chunk& k, const Worker& w, int64_t head, int64_t r, int64_t count) {
  const Tiles tiles = tiles_of(k);
  for (int64_t t = tiles.far; t < tiles.far + tiles.near; ++t) {
    const float* rows = w.scores + (t * MR + r) * LDS;
    float* score = scores_of(s.c, head, k.gone + (t - tiles.far) * BC);
    for (int64_t c = w.areas[t].first; c < w.areas[t].last; c += W) {
      const int64_t n = w.areas[t].last - c;
      vf sum = load_first(score + c, n);
      for (int64_t i = 0; i < count; ++i) sum += load(rows + i * LDS + c) * w.inverse[r + i];
      store_first(score + c, sum, n);
    }
  }
}

void attend(const Plan& s, const Chunk& k, const Worker& w, const Rows& rows) {
  const BlockMemoryForward& c = s.c;
  const Tiles tiles = tiles_of(k);
  pack_queries(s, k, w, rows);
  multiply_tiles(s, k, w, rows);
  for (int64_t r = 0; r < rows.count; ++r) w.inverse[r] = soften(s, k, w, r, (rows.r0 + r) % k.n);
  for (int64_t r = 0; r < rows.count;) {
    const int64_t count = smaller(rows.count - r, k.n - (rows.r0 + r) % k.n);
    add_shares(s, k, w, rows.h0 + (rows.r0 + r) / k.n, r, count);
    r += count;
  }
  bool begun = false;
  for (int64_t t = 0; t < tiles.far + tiles.near; ++t) {
    const Area area = w.areas[t];
    if (area.first == area.last) continue;
    multiply<TileRows>(rows.count, c.width, area.last - area.first, w.scores + t * MR * LDS + area.first, 0,
                       s.values_at(rows.slot, t) + area.first * NR, BC * NR, w.out, s.out_stride, begun);
    begun = true;
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t head = rows.h0 + (rows.r0 + r) / k.n, query = k.first + (rows.r0 + r) % k.n;
    float* out = c.out.data + head * c.out.head_stride + query * c.out.row_stride;
    for (int64_t e = 0; e < c.width; e += W)
      store_first(out + e, load(w.out + r * s.out_stride + e) * w.inverse[r], c.width - e);
  }
}

}  // namespace

void block_memory_forward(const BlockMemoryForward& call, int threads) {
  Plan s(call, threads);
  Scratch memory(s.room(nullptr));
  s.room(memory.data);
  int64_t formed = call.formed;
  for (int64_t first = 0, number = 0; first < call.queries; first += call.chunk, ++number) {
    const Chunk k = chunk_of(call, first);
    choose(s, k, formed, call.chosen + number * call.places);
    formed = k.blocks;
    const Tiles counts = tiles_of(k);
    const int64_t tiles = counts.far + counts.near, stacks = s.group / s.together;
    for (int64_t g0 = 0; call.heads > 0 && g0 < call.key_heads; g0 += s.at_once) {
      const int64_t heads = smaller(s.at_once, call.key_heads - g0);
      parallel_for(heads * tiles, 1, s.threads, [&](int64_t begin, int64_t end, int worker) {
        const Worker w(s, worker);
        for (int64_t i = begin; i < end; ++i)
          pack_tile(s, k, w, g0 + i / tiles, i % tiles, s.keys_at(i / tiles, i % tiles), s.values_at(i / tiles, i % tiles));
      });
      parallel_for(heads * stacks, 1, s.threads, [&](int64_t begin, int64_t end, int worker) {
        const Worker w(s, worker);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t slot = i / stacks, h0 = (g0 + slot) * s.group + i % stacks * s.together;
          for (int64_t r = 0; r < s.together * k.n; r += MR)
            attend(s, k, w, {h0, r, smaller(MR, s.together * k.n - r), slot});
        }
      });
    }
  }
}

}  // namespace VLM_LEVEL
}  // namespace vlm
