// Entry of token reduction: checks, orders and maps of indices; rows and similarities are the active level's.
#include "vlm/tokens.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "core/kernel_table.hpp"
#include "vlm/parallel.hpp"

namespace vlm {
namespace {

void refuse_negative(std::initializer_list<int64_t> sizes) {
  for (int64_t n : sizes)
    if (n < 0) throw std::invalid_argument("tokens: negative size");
}

// Falling value, then rising index, as one rising number; NaN counts as -inf.
uint64_t rank_key(float value, int64_t index) {
  if (value == 0.0f) value = 0.0f;  // -0 equals 0
  if (value != value) value = -std::numeric_limits<float>::infinity();
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | static_cast<uint64_t>(index);
}
int64_t index_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

// The `count` first of the keys, sorted, at the front.
void sort_first(std::vector<uint64_t>& keys, int64_t count) {
  if (count < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  std::sort(keys.begin(), keys.begin() + count);
}

struct Matching {
  const TokenMatch& call;
  const float* best;
  const int32_t* partner;
};

void order_one(const Matching& m, int64_t b) {
  const TokenMatch& c = m.call;
  const int64_t sources = (c.length + 1) / 2, kept_count = c.length - c.merged;
  const int64_t first = std::min((c.protect + 1) / 2, sources);  // protected sources come first
  const float* best = m.best + b * sources;
  const int32_t* partner = m.partner + b * sources;
  int64_t *source = c.source + b * c.merged, *target = c.target + b * c.merged;
  int64_t *kept = c.kept + b * kept_count, *assign = c.assign + b * c.length;
  std::vector<uint64_t> keys;
  for (int64_t a = first; a < sources; ++a) keys.push_back(rank_key(best[a], a));
  sort_first(keys, c.order == MatchOrder::similarity ? static_cast<int64_t>(keys.size()) : c.merged);
  std::fill(assign, assign + c.length, int64_t{0});
  for (int64_t r = 0; r < c.merged; ++r) {
    const int64_t a = index_of(keys[r]);
    source[r] = 2 * a;
    target[r] = 2 * static_cast<int64_t>(partner[a]) + 1;
    assign[2 * a] = -1;
  }
  int64_t at = 0;
  const auto keep = [&](int64_t n) {
    if (assign[n] == -1) return;
    kept[at] = n;
    assign[n] = at++;
  };
  if (c.order == MatchOrder::position) {
    for (int64_t n = 0; n < c.length; ++n) keep(n);
  } else {
    const bool by_index = c.order == MatchOrder::sources_first;
    for (int64_t n = 0; n < (by_index ? c.length : 2 * first); n += 2) keep(n);
    for (std::size_t r = c.merged; !by_index && r < keys.size(); ++r) keep(2 * index_of(keys[r]));
    for (int64_t n = 1; n < c.length; n += 2) keep(n);
  }
  for (int64_t r = 0; r < c.merged; ++r) assign[source[r]] = assign[target[r]];
}

void select_one(const TokenSelect& c, int64_t b) {
  const int64_t from = b * c.length;
  int64_t* index = c.index + from;
  std::vector<uint64_t> keys;
  int64_t found = 0;
  for (int64_t n = 0; n < c.length; ++n) {
    if (c.valid != nullptr && c.valid[from + n] == 0) continue;
    if (c.always != nullptr && c.always[from + n] != 0)
      index[found++] = n;
    else
      keys.push_back(rank_key(c.scores[from + n], n));
  }
  const int64_t count = std::clamp<int64_t>(c.counts[b], 0, static_cast<int64_t>(keys.size()));
  if (count < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  for (int64_t r = 0; r < count; ++r) index[found++] = index_of(keys[r]);
  std::sort(index, index + found);
  std::fill(index + found, index + c.length, int64_t{-1});
  c.found[b] = found;
}

}  // namespace

void token_match(const TokenMatch& call, int threads) {
  refuse_negative({call.batch, call.heads, call.length, call.width, call.merged, call.protect});
  if (call.length > INT32_MAX) throw std::invalid_argument("token match: over 2^31 tokens");
  if (call.heads == 0) throw std::invalid_argument("token match: no heads");
  if (call.order < MatchOrder::sources_first || call.order > MatchOrder::similarity)
    throw std::invalid_argument("token match: unknown order");
  if (call.merged > std::max<int64_t>(call.length - call.protect, 0) / 2)
    throw std::invalid_argument("token match: more merges than half of the unprotected tokens");
  const int64_t sources = (call.length + 1) / 2;
  std::vector<float> best(call.batch * sources);
  std::vector<int32_t> partner(call.batch * sources);
  if (call.merged > 0 || call.order == MatchOrder::similarity)
    active_kernels().token_partners(call, best.data(), partner.data(), std::max(threads, 1));
  Matching matching{call, best.data(), partner.data()};
  parallel_ranges(call.batch, 1, call.batch * call.length < 4096 ? 1 : std::max(threads, 1),
                  [](void* context, int64_t begin, int64_t end, int) {
                    for (int64_t b = begin; b < end; ++b) order_one(*static_cast<Matching*>(context), b);
                  },
                  &matching);
}

void token_select(const TokenSelect& call, int threads) {
  refuse_negative({call.batch, call.length});
  if (call.length > INT32_MAX) throw std::invalid_argument("token select: over 2^31 tokens");
  TokenSelect copy = call;
  parallel_ranges(call.batch, 1, call.batch * call.length < 16384 ? 1 : std::max(threads, 1),
                  [](void* context, int64_t begin, int64_t end, int) {
                    for (int64_t b = begin; b < end; ++b) select_one(*static_cast<TokenSelect*>(context), b);
                  },
                  &copy);
}

void token_gather(const TokenGather& call, int threads) {
  refuse_negative({call.batch, call.from_length, call.length, call.width});
  for (int64_t at = 0; at < call.batch * call.length; ++at)
    if (call.index[at] < -1 || call.index[at] >= call.from_length)
      throw std::invalid_argument("token gather: an index lies outside of the tokens");
  if (call.element_bytes < 1) throw std::invalid_argument("token gather: an element has at least one byte");
  if (call.weights != nullptr && call.element_bytes != sizeof(float))
    throw std::invalid_argument("token gather: weights want float32");
  active_kernels().token_gather(call, std::max(threads, 1));
}

void token_scatter(const TokenScatter& call, int threads) {
  refuse_negative({call.batch, call.from_length, call.length, call.width});
  std::vector<int64_t> starts(call.batch * call.length + 1, 0), members(call.batch * call.from_length);
  const int64_t rows = call.batch * call.from_length;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t index = call.index[n];
    if (index < -1 || index >= call.length)
      throw std::invalid_argument("token scatter: an index lies outside of the slots");
    if (index >= 0) ++starts[n / call.from_length * call.length + index + 1];
  }
  for (int64_t slot = 0; slot < call.batch * call.length; ++slot) starts[slot + 1] += starts[slot];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < rows; ++n)
    if (call.index[n] >= 0) members[next[n / call.from_length * call.length + call.index[n]]++] = n;
  active_kernels().token_scatter(call, starts.data(), members.data(), std::max(threads, 1));
}

void token_weights(const TokenWeights& call) {
  refuse_negative({call.batch, call.length, call.slots});
  std::vector<double> total(call.slots);
  std::vector<int64_t> count(call.slots);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t* assign = call.assign + b * call.length;
    const float* sizes = call.sizes == nullptr ? nullptr : call.sizes + b * call.length;
    float* weights = call.weights + b * call.length;
    std::fill(total.begin(), total.end(), 0.0);
    std::fill(count.begin(), count.end(), int64_t{0});
    for (int64_t n = 0; n < call.length; ++n) {
      if (assign[n] < 0 || assign[n] >= call.slots)
        throw std::invalid_argument("token weights: an index lies outside of the slots");
      total[assign[n]] += sizes == nullptr ? 1.0 : static_cast<double>(sizes[n]);
      ++count[assign[n]];
    }
    for (int64_t n = 0; n < call.length; ++n) {
      const int64_t slot = assign[n];
      const double size = sizes == nullptr ? 1.0 : static_cast<double>(sizes[n]);
      weights[n] = static_cast<float>(call.by_size && total[slot] > 0.0 ? size / total[slot]
                                                                       : 1.0 / static_cast<double>(count[slot]));
    }
    for (int64_t slot = 0; slot < call.slots; ++slot)
      call.slot_sizes[b * call.slots + slot] = static_cast<float>(total[slot]);
  }
}

}  // namespace vlm
