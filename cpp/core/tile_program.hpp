// Tile programs: what part of a score tile may exist. Per-level code.
//
// A program is an AND of atoms (vlm/mask.hpp; global keys and queries open the local ones). Each atom says of a tile of
// queries [i0, i1) and keys [j0, j1) inside key tile `tile` whether all, some or no pairs are allowed, between which
// columns a group of queries sees anything, and removes pairs from a row of a partial tile. "Skip" and "full" are never
// wrong; "partial" may be said of a tile that is really one of them. A new kind of mask is a new atom here; the drivers
// do not change.
//
// Queries are summarised by groups of MR rows, keys by tiles of BC.
#pragma once

#include "core/mask_rows.hpp"
#include "core/tile_gemm.hpp"

namespace vlm {
namespace VLM_LEVEL {

VLM_INLINE Cover both(Cover a, Cover b) { return a < b ? a : b; }

struct Columns {  // of a tile, [first, last)
  int64_t first, last;
};

// Set scores[begin, end) to -inf, except where `open` has a lane of all ones (null = nowhere).
static void remove_range(float* scores, int64_t begin, int64_t end, const int32_t* open) {
  for (int64_t c = begin / W * W; c < end; c += W) {  // scores have room up to a multiple of W
    const vi at = lane_numbers() + static_cast<int32_t>(c);
    vi gone = (at >= static_cast<int32_t>(begin)) & (at < static_cast<int32_t>(end));
    if (open != nullptr) gone &= ~load(open + c);
    store(scores + c, select(gone, splat(-infinity), load(scores + c)));
  }
}

// Keep only keys of sorted, disjoint ranges.
static void keep_ranges(float* scores, const int32_t* ranges, int64_t count, int64_t j0, int64_t n,
                        const int32_t* open) {
  int64_t done = 0;
  for (int64_t k = 0; k < count && done < n; ++k) {
    const int64_t lo = ranges[2 * k] - j0, hi = ranges[2 * k + 1] - j0;
    if (hi <= done || hi <= lo) continue;
    if (lo > done) remove_range(scores, done, smaller(lo, n), open);
    done = hi;
  }
  if (done < n) remove_range(scores, done, n, open);
}

// The keys of query i are a union of ranges.
struct RangeAtom {
  const int32_t* ranges;  // [queries, count, 2]
  const int32_t* bounds;  // [groups, count, 4]: least lo and largest hi, then largest lo and least hi, of a group
  int32_t count;
  bool local;

  static void summarise(const int32_t* ranges, int64_t queries, int32_t count, int32_t* bounds) {
    for (int64_t i0 = 0; i0 < queries; i0 += MR, bounds += count * 4)
      for (int32_t k = 0; k < count; ++k) {
        int32_t* to = bounds + k * 4;
        to[0] = INT32_MAX, to[1] = 0, to[2] = 0, to[3] = INT32_MAX;
        for (int64_t i = i0; i < smaller(i0 + MR, queries); ++i) {
          const int32_t lo = ranges[(i * count + k) * 2], hi = ranges[(i * count + k) * 2 + 1];
          if (lo < hi) {
            to[0] = lo < to[0] ? lo : to[0];
            to[1] = hi > to[1] ? hi : to[1];
          }
          to[2] = lo > to[2] ? lo : to[2];
          to[3] = hi < to[3] ? hi : to[3];
        }
      }
  }
  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    bool any = false, all = true;
    for (int64_t g = i0 / MR; g <= (i1 - 1) / MR; ++g) {
      bool inside = false;
      for (int32_t k = 0; k < count; ++k) {
        const int32_t* of = bounds + (g * count + k) * 4;
        any = any || (of[0] < j1 && of[1] > j0);
        inside = inside || (of[2] <= j0 && of[3] >= j1);
      }
      all = all && inside;
    }
    return all ? Cover::full : any ? Cover::partial : Cover::skip;
  }
  VLM_INLINE_MEMBER void columns(int64_t i0, int64_t i1, int64_t j0, Columns& seen) const {
    int64_t first = seen.last, last = 0;
    for (int64_t g = i0 / MR; g <= (i1 - 1) / MR; ++g)
      for (int32_t k = 0; k < count; ++k) {
        const int32_t* of = bounds + (g * count + k) * 4;
        const int64_t lo = larger(of[0] - j0, seen.first), hi = smaller(of[1] - j0, seen.last);
        if (lo >= hi) continue;
        first = smaller(first, lo);
        last = larger(last, hi);
      }
    seen.first = first;
    seen.last = larger(first, last);
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n, const int32_t* open) const {
    keep_ranges(scores, ranges + i * count * 2, count, j0, n, open);
  }
};

// Key ranges of each block of queries (a list of key blocks). Always local.
struct BlockAtom {
  const int32_t* ranges;
  const int64_t* starts;  // [query blocks + 1]
  int64_t query_block;

  // First range of block e that ends behind j0.
  VLM_INLINE_MEMBER int64_t find(int64_t e, int64_t j0) const {
    int64_t low = starts[e], high = starts[e + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ranges[2 * middle + 1] > j0)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    bool any = false, all = true;
    for (int64_t e = i0 / query_block; e <= (i1 - 1) / query_block; ++e) {
      const int64_t at = find(e, j0);
      const bool there = at < starts[e + 1] && ranges[2 * at] < j1;
      any = any || there;
      all = all && there && ranges[2 * at] <= j0 && ranges[2 * at + 1] >= j1;
    }
    return all ? Cover::full : any ? Cover::partial : Cover::skip;
  }
  VLM_INLINE_MEMBER void columns(int64_t i0, int64_t i1, int64_t j0, Columns& seen) const {
    int64_t first = seen.last, last = 0;
    for (int64_t e = i0 / query_block; e <= (i1 - 1) / query_block; ++e)
      for (int64_t at = find(e, j0 + seen.first); at < starts[e + 1] && ranges[2 * at] < j0 + seen.last; ++at) {
        first = smaller(first, larger(ranges[2 * at] - j0, seen.first));
        last = larger(last, smaller(ranges[2 * at + 1] - j0, seen.last));
      }
    seen.first = first;
    seen.last = larger(first, last);
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n, const int32_t* open) const {
    const int64_t e = i / query_block, at = find(e, j0);
    keep_ranges(scores, ranges + 2 * at, starts[e + 1] - at, j0, n, open);
  }
};

// Equal ids, or a shared key, or an open query, or (spans) the past.
struct IdAtom {
  IdTable table;          // of this batch
  const int32_t* groups;  // [groups of queries, 4]: least and largest id, any and all open
  const int32_t* tiles;   // [key tiles, 4]: least and largest id, any and all shared

  static void summarise(const int32_t* ids, int64_t count, int64_t step, bool has_free, int32_t free, int32_t* to) {
    for (int64_t i0 = 0; i0 < count; i0 += step, to += 4) {
      to[0] = INT32_MAX, to[1] = INT32_MIN, to[2] = 0, to[3] = 1;
      for (int64_t i = i0; i < smaller(i0 + step, count); ++i) {
        to[0] = ids[i] < to[0] ? ids[i] : to[0];
        to[1] = ids[i] > to[1] ? ids[i] : to[1];
        const bool is = has_free && ids[i] == free;
        to[2] = to[2] || is;
        to[3] = to[3] && is;
      }
    }
  }
  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t tile) const {
    if (table.causal && j1 - 1 <= i0 + table.offset) return Cover::full;
    const int32_t* of = tiles + 4 * tile;
    bool meet = of[2] != 0 || (table.causal && j0 <= i1 - 1 + table.offset), same = of[0] == of[1], open = true;
    for (int64_t g = i0 / MR; g <= (i1 - 1) / MR; ++g) {
      const int32_t* row = groups + 4 * g;
      meet = meet || row[2] != 0 || (row[0] <= of[1] && of[0] <= row[1]);
      same = same && row[0] == of[0] && row[1] == of[0];
      open = open && row[3] != 0;
    }
    return same || open || of[3] != 0 ? Cover::full : meet ? Cover::partial : Cover::skip;
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n) const {
    const int32_t id = table.query_ids[i];
    if (table.has_open && id == table.open) return;
    const int64_t past = table.causal ? i + table.offset - j0 + 1 : 0;
    const vi mine = splat_int(id), shared = splat_int(table.has_shared ? table.shared : id);
    const vi reach = splat_int(static_cast<int32_t>(larger(smaller(past, BC), 0)));
    for (int64_t c = 0; c < n; c += W) {
      const vi key = load(table.key_ids + j0 + c), at = lane_numbers() + static_cast<int32_t>(c);
      store(scores + c, select((key == mine) | (key == shared) | (at < reach), load(scores + c), splat(-infinity)));
    }
  }
};

// allow[i, j] as bytes.
struct DenseAtom {
  const uint8_t* allow;
  int64_t row_stride;

  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    bool any = false, all = true;
    for (int64_t i = i0; i < i1; ++i) {
      const uint8_t* row = allow + i * row_stride;
      for (int64_t j = j0; j < j1 && (all || !any); ++j) {
        any = any || row[j] != 0;
        all = all && row[j] != 0;
      }
      if (any && !all) return Cover::partial;
    }
    return all ? Cover::full : any ? Cover::partial : Cover::skip;
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n) const {
    const uint8_t* row = allow + i * row_stride + j0;
    for (int64_t c = 0; c < n; ++c) scores[c] = row[c] != 0 ? scores[c] : -infinity;
  }
};

// Key j exists if lanes[j] is all ones. Covers of whole tiles are prepared once for a sequence.
struct KeyAtom {
  const int32_t* lanes;   // [keys padded to W], 0 or -1; null = every key
  const uint8_t* covers;  // [key tiles]

  VLM_INLINE_MEMBER Cover cover(int64_t tile) const {
    return lanes == nullptr ? Cover::full : static_cast<Cover>(covers[tile]);
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t j0, int64_t n) const {
    if (lanes == nullptr) return;
    for (int64_t c = 0; c < n; c += W)  // scores have room up to a multiple of W
      store(scores + c, select(load(lanes + j0 + c), load(scores + c), splat(-infinity)));
  }
};

// Queries that see all keys, and keys that all queries see, as far as local atoms go.
struct GlobalAtom {
  const int32_t* queries;  // [queries], null = none
  const int32_t* keys;     // [padded keys], 0 or -1
  const uint8_t* tiles;    // [key tiles], whether any key is global

  VLM_INLINE_MEMBER bool opens(int64_t i0, int64_t i1, int64_t tile) const {
    if (queries == nullptr) return false;
    if (tiles[tile]) return true;
    for (int64_t i = i0; i < i1; ++i)
      if (queries[i]) return true;
    return false;
  }
};

// Where the keys end that a query, or any before it, may see.
struct ReachAtom {
  const int32_t* reach;  // [queries]; null = all keys

  VLM_INLINE_MEMBER int64_t seen(int64_t i, int64_t j0, int64_t n) const {
    if (reach == nullptr) return n;
    return larger(0, smaller(reach[i] - j0, n));
  }
};

struct MaskProgram {
  ReachAtom causal;
  KeyAtom keys;
  GlobalAtom global;
  int range_count, id_count, dense_count, block_count;
  RangeAtom ranges[max_range_tables];
  IdAtom ids[max_id_tables];
  DenseAtom dense[max_dense_tables];
  BlockAtom blocks[max_block_tables];

  VLM_INLINE_MEMBER Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t tile) const {
    Cover hard = keys.cover(tile), local = Cover::full;
    for (int t = 0; t < range_count && hard != Cover::skip; ++t) {
      Cover& to = ranges[t].local ? local : hard;
      to = both(to, ranges[t].cover(i0, i1, j0, j1));
    }
    for (int t = 0; t < block_count && hard != Cover::skip; ++t) local = both(local, blocks[t].cover(i0, i1, j0, j1));
    if (local != Cover::full && global.opens(i0, i1, tile)) local = Cover::partial;
    hard = both(hard, local);
    for (int t = 0; t < id_count && hard != Cover::skip; ++t) hard = both(hard, ids[t].cover(i0, i1, j0, j1, tile));
    for (int t = 0; t < dense_count && hard != Cover::skip; ++t) hard = both(hard, dense[t].cover(i0, i1, j0, j1));
    return hard;
  }
  // Columns of the tile [j0, j0 + n) outside of which queries [i0, i1) see nothing. `first` is a multiple of NR.
  VLM_INLINE_MEMBER Columns columns(int64_t i0, int64_t i1, int64_t j0, int64_t n, int64_t tile) const {
    Columns seen{0, n};
    const bool open = global.opens(i0, i1, tile);
    for (int t = 0; t < range_count; ++t)
      if (!(ranges[t].local && open)) ranges[t].columns(i0, i1, j0, seen);
    for (int t = 0; t < block_count && !open; ++t) blocks[t].columns(i0, i1, j0, seen);
    if (seen.first >= seen.last) return {0, 0};
    seen.first = seen.first / NR * NR;
    return seen;
  }
  VLM_INLINE_MEMBER void remove(float* scores, int64_t i, int64_t j0, int64_t n) const {
    keys.remove(scores, j0, n);
    const bool open_row = global.queries != nullptr && global.queries[i] != 0;
    const int32_t* open_keys = global.queries == nullptr ? nullptr : global.keys + j0;
    for (int t = 0; t < range_count; ++t)
      if (!(ranges[t].local && open_row)) ranges[t].remove(scores, i, j0, n, ranges[t].local ? open_keys : nullptr);
    for (int t = 0; t < block_count && !open_row; ++t) blocks[t].remove(scores, i, j0, n, open_keys);
    for (int t = 0; t < id_count; ++t) ids[t].remove(scores, i, j0, n);
    for (int t = 0; t < dense_count; ++t) dense[t].remove(scores, i, j0, n);
  }
};

struct OwnedMask : PreparedMask {
  explicit OwnedMask(const MaskSpec& spec) : PreparedMask(prepare_mask(spec)) {}
  ~OwnedMask() { release_mask(*this); }
  OwnedMask(const OwnedMask&) = delete;
  OwnedMask& operator=(const OwnedMask&) = delete;
};

// The prepared mask of a call with its summaries; gives the program of one batch and head.
class MaskTables {
 public:
  explicit MaskTables(const MaskSpec& spec) : spec_(spec), mask_(spec), memory_(room(spec, mask_)) {
    int32_t* at = reinterpret_cast<int32_t*>(memory_.data);
    for (int t = 0; t < mask_.range_count; ++t) {
      const RangeTable& table = mask_.ranges[t];
      range_bounds_[t] = at;
      const int64_t step = groups() * table.count * 4;
      for (int64_t b = 0; b < batches(table.batch_stride); ++b, at += step)
        RangeAtom::summarise(table.ranges + b * table.batch_stride, spec.queries, table.count, at);
    }
    for (int t = 0; t < mask_.id_count; ++t) {
      const IdTable& table = mask_.ids[t];
      id_groups_[t] = at;
      for (int64_t b = 0; b < batches(table.query_stride); ++b, at += groups() * 4)
        IdAtom::summarise(table.query_ids + b * table.query_stride, spec.queries, MR, table.has_open, table.open, at);
      id_tiles_[t] = at;
      for (int64_t b = 0; b < batches(table.key_stride); ++b, at += tiles() * 4)
        IdAtom::summarise(table.key_ids + b * table.key_stride, spec.keys, BC, table.has_shared, table.shared, at);
    }
    global_tiles_ = reinterpret_cast<uint8_t*>(at);
    if (mask_.global.queries != nullptr)
      for (int64_t b = 0; b < batches(mask_.global.key_stride); ++b)
        for (int64_t tile = 0; tile < tiles(); ++tile) {
          bool any = false;
          for (int64_t j = tile * BC; j < smaller(tile * BC + BC, spec.keys); ++j)
            any = any || mask_.global.keys[b * mask_.global.key_stride + j] != 0;
          global_tiles_[b * tiles() + tile] = any;
        }
  }
  MaskTables(const MaskTables&) = delete;
  MaskTables& operator=(const MaskTables&) = delete;

  void fill(MaskProgram& to, int64_t b, int64_t h) const {
    to.causal.reach = mask_.reach == nullptr ? nullptr : mask_.reach + b * mask_.reach_stride;
    to.range_count = mask_.range_count;
    for (int t = 0; t < mask_.range_count; ++t) {
      const RangeTable& table = mask_.ranges[t];
      const int64_t at = table.batch_stride == 0 ? 0 : b;
      to.ranges[t] = {table.ranges + at * table.batch_stride, range_bounds_[t] + at * groups() * table.count * 4,
                      table.count, table.local};
    }
    to.id_count = mask_.id_count;
    for (int t = 0; t < mask_.id_count; ++t) {
      IdTable table = mask_.ids[t];
      const int64_t query_at = table.query_stride == 0 ? 0 : b, key_at = table.key_stride == 0 ? 0 : b;
      table.query_ids += query_at * table.query_stride;
      table.key_ids += key_at * table.key_stride;
      to.ids[t] = {table, id_groups_[t] + query_at * groups() * 4, id_tiles_[t] + key_at * tiles() * 4};
    }
    to.dense_count = mask_.dense_count;
    for (int t = 0; t < mask_.dense_count; ++t) {
      const DenseTable& table = mask_.dense[t];
      to.dense[t] = {table.allow + b * table.batch_stride + h * table.head_stride, table.row_stride};
    }
    to.block_count = mask_.block_count;
    for (int t = 0; t < mask_.block_count; ++t) {
      const BlockTable& table = mask_.blocks[t];
      to.blocks[t] = {table.ranges, table.starts + b * table.batch_stride + h * table.head_stride, table.query_block};
    }
    to.global = {nullptr, nullptr, nullptr};
    if (mask_.global.queries != nullptr)
      to.global = {mask_.global.queries + b * mask_.global.query_stride,
                   mask_.global.keys + b * mask_.global.key_stride,
                   global_tiles_ + (mask_.global.key_stride == 0 ? 0 : b) * tiles()};
  }

 private:
  MaskSpec spec_;
  OwnedMask mask_;
  Scratch memory_;
  int32_t* range_bounds_[max_range_tables];
  int32_t* id_groups_[max_id_tables];
  int32_t* id_tiles_[max_id_tables];
  uint8_t* global_tiles_;

  int64_t groups() const { return (spec_.queries + MR - 1) / MR; }
  int64_t tiles() const { return (spec_.keys + BC - 1) / BC; }
  int64_t batches(int64_t stride) const { return stride == 0 ? smaller(spec_.batch, 1) : spec_.batch; }
  static int64_t room(const MaskSpec& s, const PreparedMask& mask) {
    const int64_t groups = (s.queries + MR - 1) / MR, tiles = (s.keys + BC - 1) / BC;
    int64_t count = 0;
    for (int t = 0; t < mask.range_count; ++t)
      count += (mask.ranges[t].batch_stride == 0 ? 1 : s.batch) * groups * mask.ranges[t].count * 4;
    for (int t = 0; t < mask.id_count; ++t)
      count += (mask.ids[t].query_stride == 0 ? 1 : s.batch) * groups * 4 +
               (mask.ids[t].key_stride == 0 ? 1 : s.batch) * tiles * 4;
    if (mask.global.queries != nullptr) count += (mask.global.key_stride == 0 ? 1 : s.batch) * tiles / 4 + 1;
    return count;
  }
};

}  // namespace VLM_LEVEL
}  // namespace vlm
