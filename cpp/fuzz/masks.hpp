// Drawn mask programs: atoms with their arrays, of every kind, shared or not among batches and heads.
#pragma once

#include <algorithm>
#include <climits>
#include <deque>

#include "input.hpp"
#include "vlm/mask.hpp"

namespace vlm::fuzz {

struct Masks {
  std::vector<MaskAtom> atoms;
  std::deque<std::vector<int32_t>> ints;
  std::deque<std::vector<uint8_t>> bytes;
  bool fits = true;  // false: more tables than a program holds

  // Arrays [batch or 1, heads or 1, count]; memory ends with the last element.
  template <class T, class Fill>
  const T* array(std::deque<std::vector<T>>& keep, int64_t batch, int64_t batch_stride, int64_t heads,
                 int64_t head_stride, int64_t count, Fill fill) {
    const int64_t B = batch_stride == 0 ? std::min<int64_t>(batch, 1) : batch;
    const int64_t H = head_stride == 0 ? std::min<int64_t>(heads, 1) : heads;
    const bool any = B > 0 && H > 0 && count > 0;
    std::vector<T> values(any ? (B - 1) * batch_stride + (H - 1) * head_stride + count : 0, T(113));
    for (int64_t b = 0; any && b < B; ++b)
      for (int64_t h = 0; h < H; ++h) fill(values.data() + b * batch_stride + h * head_stride);
    keep.push_back(std::move(values));
    return keep.back().data();
  }

  void draw(Bytes& in, Draw& draw, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
    const int64_t count = in.below(5);
    bool has_global = false;
    int64_t dense = 0;
    for (int64_t t = 0; t < count; ++t) {
      const AtomKind kind = static_cast<AtomKind>(in.below(11));
      if (kind == AtomKind::global && has_global) continue;
      has_global = has_global || kind == AtomKind::global;
      dense += kind == AtomKind::dense;
      atoms.push_back(atom(in, draw, kind, batch, heads, queries, keys));
    }
    fits = dense <= 2;
  }

  int64_t offset(Bytes& in, int64_t queries, int64_t keys) {
    switch (in.below(5)) {
      case 0: return 0;
      case 1: return keys - queries;
      case 2: return in.between(-20, 20);
      case 3: return in.between(-queries - 2, keys + 2);
      default: return in.one_in(2) ? INT_MAX : INT_MIN;
    }
  }
  int64_t distance(Bytes& in, int64_t keys) {
    const int64_t kind = in.below(8);
    return kind == 6 ? INT64_MAX : kind == 7 ? INT_MAX : in.below(keys + 2);
  }

  MaskAtom atom(Bytes& in, Draw& draw, AtomKind kind, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
    MaskAtom t{kind, {offset(in, queries, keys), 0, 0, 0}, nullptr, 0, 0, 0, nullptr, 0, 0};
    const auto stride = [&](int64_t count) { return in.below(3) == 2 ? 0 : count + in.below(3); };
    switch (kind) {
      case AtomKind::band:
      case AtomKind::local_band: t.n[1] = distance(in, keys), t.n[2] = distance(in, keys); break;
      case AtomKind::block_causal: t.n[1] = 1 + in.below(keys + 2); break;
      case AtomKind::lambda: t.n[1] = distance(in, keys), t.n[2] = distance(in, keys); break;
      case AtomKind::prefix:
        t.a_batch = stride(1);
        t.a = array(ints, batch, t.a_batch, 1, 0, 1,
                    [&](int32_t* at) { *at = static_cast<int32_t>(draw.below(keys + 4)) - 2; });
        break;
      case AtomKind::rows:
        t.a_batch = stride(2 * queries);
        t.a = array(ints, batch, t.a_batch, 1, 0, 2 * queries, [&](int32_t* at) {
          for (int64_t i = 0; i < queries; ++i) {
            at[2 * i] = static_cast<int32_t>(draw.below(keys + 4)) - 2;
            at[2 * i + 1] = draw.below(9) == 0 ? INT_MIN : at[2 * i] + static_cast<int32_t>(draw.below(keys + 4)) - 1;
          }
        });
        break;
      case AtomKind::spans:
      case AtomKind::ids:
      case AtomKind::global: {
        if (kind == AtomKind::ids) {
          t.n[0] = in.below(2), t.n[2] = in.below(2);
          t.n[1] = in.between(-2, 4), t.n[3] = in.between(-2, 4);
        }
        const int64_t names = 1 + in.below(6), sorted = in.below(3), rare = in.below(30) + 1;
        const auto fill = [&](int64_t length) {
          return [&, length](int32_t* at) {
            for (int64_t i = 0; i < length; ++i)
              at[i] = kind == AtomKind::global ? (draw.below(rare) == 0 ? static_cast<int32_t>(draw.below(3)) - 1 : 0)
                                               : static_cast<int32_t>(draw.below(names)) - (sorted == 1 ? 2 : 0);
            if (kind != AtomKind::global && sorted != 2) std::sort(at, at + length);
            if (kind != AtomKind::global && length > 0 && draw.below(8) == 0) at[0] = INT_MIN;
          };
        };
        t.a_batch = stride(queries);
        t.b_batch = stride(keys);
        t.a = array(ints, batch, t.a_batch, 1, 0, queries, fill(queries));
        t.b = array(ints, batch, t.b_batch, 1, 0, keys, fill(keys));
        break;
      }
      case AtomKind::dense: {
        const int64_t share = in.below(4);
        t.a_row = in.below(4) == 3 ? 0 : keys + in.below(3);
        const int64_t one = queries > 0 ? (queries - 1) * t.a_row + keys : 0;
        t.a_head = stride(one);
        t.a_batch = stride(one + (t.a_head == 0 ? 0 : (std::max<int64_t>(heads, 1) - 1) * t.a_head));
        t.a = array(bytes, batch, t.a_batch, heads, t.a_head, one, [&](uint8_t* at) {
          for (int64_t i = 0; i < one; ++i)
            at[i] = static_cast<uint8_t>(draw.below(4) >= share ? draw.below(255) + 1 : 0);
        });
        break;
      }
      case AtomKind::blocks: {
        const int64_t query_block = 1 + in.below(queries + 2), key_block = 1 + in.below(keys + 2);
        const int64_t entries = (queries + query_block - 1) / query_block + in.below(2);
        const int64_t key_blocks = (keys + key_block - 1) / key_block, slots = in.below(5);
        t.n[0] = query_block, t.n[1] = key_block, t.n[2] = slots, t.n[3] = entries;
        t.a_head = stride(entries * slots), t.b_head = stride(entries);
        t.a_batch = stride(entries * slots + (std::max<int64_t>(heads, 1) - 1) * t.a_head);
        t.b_batch = stride(entries + (std::max<int64_t>(heads, 1) - 1) * t.b_head);
        t.a = array(ints, batch, t.a_batch, heads, t.a_head, entries * slots, [&](int32_t* at) {
          for (int64_t s = 0; s < entries * slots; ++s) at[s] = static_cast<int32_t>(draw.below(key_blocks));
        });
        t.b = array(ints, batch, t.b_batch, heads, t.b_head, entries, [&](int32_t* at) {
          for (int64_t e = 0; e < entries; ++e)
            at[e] = key_blocks == 0 ? 0 : static_cast<int32_t>(draw.below(slots + 1));
        });
        break;
      }
    }
    return t;
  }

  std::string text() const {
    std::string all;
    for (const MaskAtom& t : atoms)
      all += "\n  " + words("atom", int(t.kind), "n", t.n[0], "", t.n[1], "", t.n[2], "", t.n[3], "a batch", t.a_batch,
                            "head", t.a_head, "row", t.a_row, "b batch", t.b_batch, "head", t.b_head);
    return all;
  }

  // Add one atom that no program may hold.
  void spoil(Bytes& in, int64_t queries) {
    static const int32_t zero[1] = {0};
    const MaskAtom none{AtomKind::global, {0, 0, 0, 0}, zero, 0, 0, 0, zero, 0, 0};
    MaskAtom bad = none;
    bad.a = bad.b = nullptr;
    switch (in.below(5)) {
      case 0: bad.kind = static_cast<AtomKind>(11 + in.below(100)); break;
      case 1: bad.kind = static_cast<AtomKind>(-1 - in.below(100)); break;
      case 2: bad.kind = AtomKind::block_causal, bad.n[1] = -in.below(3); break;
      case 3: bad.kind = AtomKind::blocks, bad.n[0] = -in.below(2), bad.n[1] = 1; break;
      default:
        bad.kind = AtomKind::blocks, bad.n[0] = 1, bad.n[1] = 1, bad.n[2] = 0,
        bad.n[3] = queries > 0 ? queries - 1 : -1;
    }
    atoms.insert(atoms.begin() + in.below(static_cast<int64_t>(atoms.size()) + 1), bad);
  }
};

}  // namespace vlm::fuzz
