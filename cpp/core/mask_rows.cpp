#include "core/mask_rows.hpp"

#include <algorithm>
#include <climits>
#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

namespace vlm {
namespace {

struct Memory {
  std::deque<std::vector<int32_t>> ints;
  std::deque<std::vector<int64_t>> longs;
};

struct Range {
  int64_t lo, hi;
};
struct Run {
  int32_t id;
  int64_t lo, hi;
};

[[noreturn]] void refuse(const char* what) { throw std::invalid_argument(what); }

class Builder {
 public:
  explicit Builder(const MaskSpec& spec) : s_(spec), memory_(new Memory) {
    for (int64_t t = 0; t < s_.count; ++t) {
      if (s_.atoms[t].kind != AtomKind::global) continue;
      if (global_ != nullptr) refuse("mask: more than one global atom");
      global_ = &s_.atoms[t];
      need(*global_, s_.queries, s_.keys);
    }
  }

  PreparedMask build() {
    if (s_.causal) add({AtomKind::band, {s_.causal_offset, INT64_MAX, 0, 0}, nullptr, 0, 0, 0, nullptr, 0, 0});
    for (int64_t t = 0; t < s_.count; ++t) add(s_.atoms[t]);
    if (hard_.on) publish(hard_.ranges, hard_.batched, 1, false);
    if (local_.on) publish(local_.ranges, local_.batched, 1, true);
    reach();
    out_.memory = memory_.release();
    return out_;
  }

 private:
  struct Folded {  // an AND of single ranges
    bool on = false, batched = false;
    std::vector<int32_t> ranges;
  };

  const MaskSpec& s_;
  std::unique_ptr<Memory> memory_;
  PreparedMask out_{};
  const MaskAtom* global_ = nullptr;
  Folded hard_, local_;

  // Sums and products of a position with the numbers of an atom must stay within int64. An offset beyond all positions
  // says no more than `far`, a distance beyond all positions and offsets no more than four times that.
  static MaskAtom within_reach(MaskAtom atom) {
    constexpr int64_t far = int64_t{1} << 32;
    if (atom.kind == AtomKind::blocks || atom.kind == AtomKind::ids) return atom;
    atom.n[0] = std::clamp(atom.n[0], -far, far);
    for (int k = 1; k < 4; ++k) atom.n[k] = std::clamp(atom.n[k], -4 * far, 4 * far);
    return atom;
  }

  // Arrays of no element may be null.
  void need(const MaskAtom& atom, int64_t of_first, int64_t of_second) const {
    if ((atom.a == nullptr && s_.batch > 0 && of_first > 0) || (atom.b == nullptr && s_.batch > 0 && of_second > 0))
      refuse("mask: an atom lacks an array");
  }

  void add(const MaskAtom& given) {
    const MaskAtom atom = within_reach(given);
    switch (atom.kind) {
      case AtomKind::band:
      case AtomKind::local_band: return band(atom);
      case AtomKind::block_causal: return block_causal(atom);
      case AtomKind::prefix: return need(atom, 1, 0), prefix(atom);
      case AtomKind::lambda: return lambda(atom);
      case AtomKind::spans: return need(atom, s_.queries, s_.keys), spans(atom);
      case AtomKind::ids: return need(atom, s_.queries, s_.keys), ids(atom);
      case AtomKind::rows: return need(atom, s_.queries, 0), rows(atom);
      case AtomKind::global: return global(atom);
      case AtomKind::dense: return need(atom, s_.heads * s_.queries * s_.keys, 0), dense(atom);
      case AtomKind::blocks: return blocks(atom);
    }
    refuse("mask: unknown kind of atom");
  }

  // Of an array with this stride of batches.
  int64_t copies(int64_t batch_stride) const { return batch_stride != 0 ? s_.batch : std::min<int64_t>(s_.batch, 1); }

  int32_t clip(int64_t j) const { return static_cast<int32_t>(std::clamp<int64_t>(j, 0, s_.keys)); }
  bool is_local(bool local) const { return local && global_ != nullptr; }
  bool is_global(int64_t b, int64_t i) const {
    return static_cast<const int32_t*>(global_->a)[b * global_->a_batch + i] != 0;
  }

  // AND one range for each query into the folded table.
  template <class Rule>
  void fold(bool batched, bool local, Rule rule) {
    local = is_local(local);
    batched = (batched || (local && global_->a_batch != 0)) && s_.batch > 1;
    Folded& f = local ? local_ : hard_;
    const int64_t size = s_.queries * 2;
    if (!f.on) {
      f.on = true;
      f.ranges.resize(size);
      for (int64_t i = 0; i < s_.queries; ++i) {
        f.ranges[2 * i] = 0;
        f.ranges[2 * i + 1] = clip(s_.keys);
      }
    }
    if (batched && !f.batched) {
      f.batched = true;
      f.ranges.resize(size * s_.batch);
      for (int64_t b = 1; b < s_.batch; ++b) std::copy_n(f.ranges.begin(), size, f.ranges.begin() + b * size);
    }
    for (int64_t b = 0; b < (f.batched ? s_.batch : std::min<int64_t>(s_.batch, 1)); ++b)
      for (int64_t i = 0; i < s_.queries; ++i) {
        if (local && is_global(b, i)) continue;
        const Range r = rule(b, i);
        int32_t* at = f.ranges.data() + b * size + 2 * i;
        at[0] = std::max(at[0], clip(r.lo));
        at[1] = std::max(at[0], std::min(at[1], clip(r.hi)));
      }
  }

  // AND a union of two ranges for each query: a table of its own, unless one range is enough everywhere.
  template <class Rule>
  void fold_pairs(bool batched, bool local, Rule rule) {
    local = is_local(local);
    batched = (batched || (local && global_->a_batch != 0)) && s_.batch > 1;
    const int64_t batches = batched ? s_.batch : std::min<int64_t>(s_.batch, 1);
    std::vector<int32_t> pairs(batches * s_.queries * 4);
    bool single = true;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t i = 0; i < s_.queries; ++i) {
        Range first{0, 0}, second{0, s_.keys};
        if (!(local && is_global(b, i))) rule(b, i, first, second);
        int32_t* at = pairs.data() + (b * s_.queries + i) * 4;
        at[0] = clip(first.lo), at[1] = std::max(at[0], clip(first.hi));
        at[2] = clip(second.lo), at[3] = std::max(at[2], clip(second.hi));
        if (at[0] == at[1]) at[0] = at[1] = 0;
        if (at[2] < at[1] || (at[0] < at[1] && at[2] <= at[1])) {  // they touch: one range
          at[2] = at[0], at[3] = std::max(at[1], at[3]);
          at[0] = at[1] = 0;
        }
        single = single && at[0] == at[1];
      }
    if (!single) return publish(pairs, batched, 2, local);
    fold(batched, local, [&](int64_t b, int64_t i) {
      const int32_t* at = pairs.data() + ((batched ? b : 0) * s_.queries + i) * 4;
      return Range{at[2], at[3]};
    });
  }

  void publish(std::vector<int32_t>& ranges, bool batched, int32_t count, bool local) {
    if (out_.range_count == max_range_tables) refuse("mask: too many atoms of two ranges");
    memory_->ints.push_back(std::move(ranges));
    out_.ranges[out_.range_count++] = {memory_->ints.back().data(), batched ? s_.queries * count * 2 : 0, count, local};
  }

  void band(const MaskAtom& atom) {
    const int64_t offset = atom.n[0], below = atom.n[1], above = atom.n[2];
    fold(false, atom.kind == AtomKind::local_band,
         [=](int64_t, int64_t i) { return Range{i + offset - below, i + offset + above + 1}; });
  }

  void block_causal(const MaskAtom& atom) {
    const int64_t offset = atom.n[0], size = atom.n[1];
    if (size <= 0) refuse("mask: block size must be positive");
    fold(false, false, [=](int64_t, int64_t i) {
      const int64_t position = i + offset;
      return Range{0, position < 0 ? 0 : (position / size + 1) * size};
    });
  }

  void prefix(const MaskAtom& atom) {
    const int32_t* lengths = static_cast<const int32_t*>(atom.a);
    fold(atom.a_batch != 0, false, [=, &atom](int64_t b, int64_t i) {
      return Range{0, std::max<int64_t>(lengths[b * atom.a_batch], i + atom.n[0] + 1)};
    });
  }

  void lambda(const MaskAtom& atom) {
    const int64_t offset = atom.n[0], window = atom.n[1], sinks = atom.n[2];
    if (global_ == nullptr) fold(false, false, [=](int64_t, int64_t i) { return Range{0, i + offset + 1}; });
    fold_pairs(false, true, [=](int64_t, int64_t i, Range& first, Range& second) {
      first = {0, std::min(sinks, i + offset + 1)};
      second = {i + offset - window + 1, i + offset + 1};
    });
  }

  // Runs of equal ids, sorted by id; false if an id has more than one. Ids below `least` are passed over.
  bool runs_of(const int32_t* ids, int64_t least, std::vector<Run>& runs) const {
    runs.clear();
    for (int64_t j = 0; j < s_.keys; ++j) {
      if (ids[j] < least) continue;
      if (!runs.empty() && runs.back().id == ids[j] && runs.back().hi == j)
        ++runs.back().hi;
      else
        runs.push_back({ids[j], j, j + 1});
    }
    std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.id < b.id; });
    for (std::size_t r = 1; r < runs.size(); ++r)
      if (runs[r - 1].id == runs[r].id) return false;
    return true;
  }
  static Range run(const std::vector<Run>& runs, int32_t id) {
    const auto at = std::lower_bound(runs.begin(), runs.end(), id, [](const Run& r, int32_t x) { return r.id < x; });
    return at == runs.end() || at->id != id ? Range{0, 0} : Range{at->lo, at->hi};
  }

  // Runs of every batch; false if one of them has an id in two places.
  bool all_runs(const MaskAtom& atom, int64_t least, std::vector<std::vector<Run>>& runs) const {
    runs.resize(atom.b_batch != 0 ? s_.batch : std::min<int64_t>(s_.batch, 1));
    for (std::size_t b = 0; b < runs.size(); ++b)
      if (!runs_of(static_cast<const int32_t*>(atom.b) + b * atom.b_batch, least, runs[b])) return false;
    return true;
  }

  void ids(const MaskAtom& atom) {
    const bool has_shared = atom.n[0] != 0, has_open = atom.n[2] != 0;
    const int32_t shared = static_cast<int32_t>(atom.n[1]), open = static_cast<int32_t>(atom.n[3]);
    const int32_t* of_queries = static_cast<const int32_t*>(atom.a);
    std::vector<std::vector<Run>> runs;
    if (!all_runs(atom, INT_MIN, runs)) return id_lanes(atom, has_shared, shared, has_open, open, false, 0);
    fold_pairs(atom.a_batch != 0 || atom.b_batch != 0, false, [&](int64_t b, int64_t i, Range& first, Range& second) {
      const int32_t id = of_queries[b * atom.a_batch + i];
      if (has_open && id == open) return;
      const std::vector<Run>& here = runs[atom.b_batch != 0 ? b : 0];
      first = run(here, id);
      second = has_shared && shared != id ? run(here, shared) : Range{0, 0};
      if (second.hi == second.lo || (first.hi > first.lo && second.lo < first.lo)) std::swap(first, second);
    });
  }

  void spans(const MaskAtom& atom) {
    const int64_t offset = atom.n[0];
    const int32_t* of_queries = static_cast<const int32_t*>(atom.a);
    std::vector<std::vector<Run>> runs;
    if (!all_runs(atom, 0, runs)) return id_lanes(atom, false, 0, false, 0, true, offset);
    fold_pairs(atom.a_batch != 0 || atom.b_batch != 0, false, [&](int64_t b, int64_t i, Range& first, Range& second) {
      const int32_t id = of_queries[b * atom.a_batch + i];
      first = {0, std::max<int64_t>(i + offset + 1, 0)};
      second = id < 0 ? Range{0, 0} : run(runs[atom.b_batch != 0 ? b : 0], id);
      if (second.hi == second.lo) std::swap(first, second);
    });
  }

  void id_lanes(const MaskAtom& atom, bool has_shared, int32_t shared, bool has_open, int32_t open, bool causal,
                int64_t offset) {
    if (out_.id_count == max_id_tables) refuse("mask: too many atoms of scattered ids");
    const int64_t padded = (s_.keys + 15) / 16 * 16;
    const int64_t query_batches = copies(atom.a_batch), key_batches = copies(atom.b_batch);
    std::vector<int32_t> queries(query_batches * s_.queries), keys(key_batches * padded, INT_MIN);
    // A span id below 0 is no span: make the two sides differ.
    for (int64_t b = 0; b < query_batches; ++b)
      for (int64_t i = 0; i < s_.queries; ++i) {
        const int32_t id = static_cast<const int32_t*>(atom.a)[b * atom.a_batch + i];
        queries[b * s_.queries + i] = causal && id < 0 ? -1 : id;
      }
    for (int64_t b = 0; b < key_batches; ++b)
      for (int64_t j = 0; j < s_.keys; ++j) {
        const int32_t id = static_cast<const int32_t*>(atom.b)[b * atom.b_batch + j];
        keys[b * padded + j] = causal && id < 0 ? -2 : id;
      }
    memory_->ints.push_back(std::move(queries));
    const int32_t* of_queries = memory_->ints.back().data();
    memory_->ints.push_back(std::move(keys));
    out_.ids[out_.id_count++] = {of_queries,
                                 memory_->ints.back().data(),
                                 atom.a_batch != 0 ? s_.queries : 0,
                                 atom.b_batch != 0 ? padded : 0,
                                 has_shared,
                                 has_open,
                                 causal,
                                 shared,
                                 open,
                                 offset};
  }

  void rows(const MaskAtom& atom) {
    const int32_t* ranges = static_cast<const int32_t*>(atom.a);
    fold(atom.a_batch != 0, false, [=, &atom](int64_t b, int64_t i) {
      const int32_t* at = ranges + b * atom.a_batch + 2 * i;
      return Range{at[0], at[1]};
    });
  }

  void global(const MaskAtom& atom) {
    const int64_t padded = (s_.keys + 15) / 16 * 16, batches = copies(atom.b_batch);
    std::vector<int32_t> lanes(batches * padded, 0);
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t j = 0; j < s_.keys; ++j)
        lanes[b * padded + j] = static_cast<const int32_t*>(atom.b)[b * atom.b_batch + j] != 0 ? -1 : 0;
    memory_->ints.push_back(std::move(lanes));
    out_.global = {static_cast<const int32_t*>(atom.a), memory_->ints.back().data(), atom.a_batch,
                   atom.b_batch != 0 ? padded : 0};
  }

  void dense(const MaskAtom& atom) {
    if (out_.dense_count == max_dense_tables) refuse("mask: too many dense atoms");
    out_.dense[out_.dense_count++] = {static_cast<const uint8_t*>(atom.a), atom.a_batch, atom.a_head, atom.a_row};
  }

  void blocks(const MaskAtom& atom) {
    if (out_.block_count == max_block_tables) refuse("mask: too many block lists");
    const int64_t query_block = atom.n[0], key_block = atom.n[1], slots = atom.n[2], entries = atom.n[3];
    if (query_block <= 0 || key_block <= 0) refuse("mask: block size must be positive");
    if (slots < 0) refuse("mask: negative slots of a block list");
    if (entries < s_.queries / query_block + (s_.queries % query_block != 0))
      refuse("mask: block lists do not cover all queries");
    need(atom, s_.heads * s_.queries * slots, s_.heads * s_.queries);
    const int64_t key_blocks = s_.keys / key_block + (s_.keys % key_block != 0);
    // Lists may be shared where counts are not, and the other way round.
    const int64_t batches = atom.a_batch != 0 || atom.b_batch != 0 ? s_.batch : std::min<int64_t>(s_.batch, 1);
    const int64_t heads = atom.a_head != 0 || atom.b_head != 0 ? s_.heads : std::min<int64_t>(s_.heads, 1);
    std::vector<int32_t> ranges, sorted;
    std::vector<int64_t> starts;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        const int32_t* counts = static_cast<const int32_t*>(atom.b) + b * atom.b_batch + h * atom.b_head;
        for (int64_t e = 0; e < entries; ++e) {
          starts.push_back(static_cast<int64_t>(ranges.size()) / 2);
          const int32_t* at = static_cast<const int32_t*>(atom.a) + b * atom.a_batch + h * atom.a_head + e * slots;
          if (counts[e] < 0 || counts[e] > slots) refuse("mask: a block list counts more than its slots");
          sorted.assign(at, at + counts[e]);
          std::sort(sorted.begin(), sorted.end());
          if (!sorted.empty() && (sorted.front() < 0 || sorted.back() >= key_blocks))
            refuse("mask: a listed key block does not exist");
          for (int32_t block : sorted) {
            // A listed block begins at a key, so only its end could lie beyond int64.
            const int64_t first = block * key_block;
            const int32_t lo = clip(first), hi = clip(first + std::min(key_block, s_.keys));
            if (static_cast<int64_t>(ranges.size()) / 2 > starts.back() && ranges.back() >= lo)
              ranges.back() = hi;
            else
              ranges.insert(ranges.end(), {lo, hi});
          }
        }
        starts.push_back(static_cast<int64_t>(ranges.size()) / 2);
      }
    memory_->ints.push_back(std::move(ranges));
    memory_->longs.push_back(std::move(starts));
    out_.blocks[out_.block_count++] = {memory_->ints.back().data(), memory_->longs.back().data(),
                                       batches > 1 ? heads * (entries + 1) : 0, heads > 1 ? entries + 1 : 0,
                                       query_block};
  }

  void reach() {
    bool batched = false, any = false;
    for (int t = 0; t < out_.range_count; ++t) {
      if (out_.ranges[t].local) continue;
      any = true;
      batched = batched || out_.ranges[t].batch_stride != 0;
    }
    if (!any) return;
    const int64_t batches = batched ? s_.batch : 1;
    std::vector<int32_t> ends(batches * s_.queries);
    for (int64_t b = 0; b < batches; ++b) {
      int32_t furthest = 0;
      for (int64_t i = 0; i < s_.queries; ++i) {
        int32_t end = clip(s_.keys);
        for (int t = 0; t < out_.range_count; ++t) {
          const RangeTable& table = out_.ranges[t];
          if (table.local) continue;
          const int32_t* at = table.ranges + b * table.batch_stride + i * table.count * 2;
          int32_t last = 0;
          for (int32_t k = 0; k < table.count; ++k)
            if (at[2 * k] < at[2 * k + 1]) last = std::max(last, at[2 * k + 1]);
          end = std::min(end, last);
        }
        furthest = std::max(furthest, end);
        ends[b * s_.queries + i] = furthest;
      }
    }
    memory_->ints.push_back(std::move(ends));
    out_.reach = memory_->ints.back().data();
    out_.reach_stride = batched ? s_.queries : 0;
  }
};

}  // namespace

PreparedMask prepare_mask(const MaskSpec& spec) {
  if (spec.count == 0 && !spec.causal) return PreparedMask{};
  return Builder(spec).build();
}

void release_mask(PreparedMask& mask) {
  delete static_cast<Memory*>(mask.memory);
  mask.memory = nullptr;
}

}  // namespace vlm
