// Block memory of one row: a call behind what was read, with any scores and representatives, against the definition in
// double; one to four threads bit for bit; calls that do not fit are refused.
#include "block_memory_oracle.hpp"
#include "input.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

void spoil(Bytes& in, BlockMemoryForward& c) {
  int64_t* sizes[] = {&c.heads, &c.key_heads, &c.queries, &c.keys, &c.width, &c.first_tokens, &c.topk, &c.table_rows,
                      &c.scored, &c.formed, &c.more, &c.places};
  int64_t* numbers[] = {&c.window, &c.block, &c.representatives, &c.chunk};
  switch (in.below(8)) {
    case 0: c.key_heads = 0; return;
    case 1: c.heads = 3, c.key_heads = 2; return;
    case 2: c.width = 2 * in.below(9) + 1; return;
    case 3: *in.among(numbers) = in.one_in(2) ? INT64_MIN : -in.below(3); return;
    case 4: c.keys = int64_t(INT32_MAX) + 1; return;
    case 5: c.scored = c.keys - c.queries + 1; return;
    case 6: c.window = 5, c.chunk = 6; return;
    default: *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(40);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  BlockMemoryForward c{};
  c.key_heads = in.between(1, 2), c.heads = c.key_heads * in.between(0, 3);
  c.keys = in.size(in.one_in(4) ? 500 : 120), c.width = 2 * in.size(in.one_in(4) ? 40 : 9);
  c.queries = in.one_in(3) ? c.keys : in.below(std::min<int64_t>(c.keys, 80) + 1);
  c.first_tokens = in.one_in(8) ? INT64_MAX : in.below(12);
  c.window = in.one_in(8) ? INT64_MAX : in.between(1, in.one_in(3) ? 290 : 30);
  c.block = in.one_in(8) ? INT64_MAX : in.between(1, 20);
  c.topk = in.one_in(8) ? INT64_MAX : in.below(9);
  c.representatives = in.one_in(8) ? INT64_MAX : in.between(1, 5);
  c.chunk = in.one_in(8) ? c.window : in.between(1, std::min<int64_t>(c.window, 40));
  c.absolute = in.one_in(3);
  c.scale = 0.1f * static_cast<float>(in.below(12));
  const int64_t start = c.keys - c.queries, gone = std::max<int64_t>(0, start - c.window + 1);
  const int64_t least = std::max<int64_t>(0, gone - c.first_tokens) / c.block;  // blocks that the call begins with
  const int64_t last = start + (c.queries == 0 ? 0 : (c.queries - 1) / c.chunk * c.chunk);
  const int64_t blocks = std::max<int64_t>(0, std::max<int64_t>(0, last - c.window + 1) - c.first_tokens) / c.block;
  c.formed = in.below(least + 1);
  c.more = blocks - c.formed;
  c.places = std::min(c.topk, blocks) + in.below(3);
  const int64_t latest = std::min(gone, c.formed == 0 ? c.first_tokens : c.first_tokens + c.formed * c.block);
  c.scored = start - in.below(latest + 1);
  const int64_t turned = c.window > c.keys ? c.keys : c.window + c.chunk;
  c.table_rows = std::min<int64_t>(c.absolute ? c.keys : std::min(c.keys, turned), 1 << 20) + in.below(2);
  about = words("block memory H", c.heads, "", c.key_heads, "n", c.queries, "T", c.keys, "D", c.width, "first",
                c.first_tokens, "window", c.window, "block", c.block, "topk", c.topk, "r", c.representatives, "chunk",
                c.chunk, "absolute", int(c.absolute), "formed", c.formed, "more", c.more, "scored", c.scored);
  if (in.one_in(10)) {
    spoil(in, c);
    require_refused([&] { block_memory_forward(c, threads); }, "block memory");
    return 0;
  }
  Field q(in, 1, c.heads, c.queries, c.width), k(in, 1, c.key_heads, c.keys, c.width);
  Field v(in, 1, c.key_heads, c.keys, c.width), means(in, 1, c.heads, c.formed, c.width);
  const Field shape(in, 1, c.heads, c.queries, c.width);
  for (Field* field : {&q, &k, &v, &means}) field->fill(draw);
  c.q = q.view<Heads>(), c.k = k.view<Heads>(), c.v = v.view<Heads>(), c.means = means.view<Heads>();
  const test::Angles angles(c.table_rows, c.width);
  c.cosines = {angles.cosines.data(), c.width / 2}, c.sines = {angles.sines.data(), c.width / 2};
  std::vector<float> before(c.heads * (c.scored + c.queries), 0.0f);
  for (int64_t h = 0; h < c.heads; ++h)
    for (int64_t j = 0; j < c.scored; ++j)  // small whole numbers: many are equal
      before[h * (c.scored + c.queries) + j] = static_cast<float>(draw.below(4));
  const int64_t chunks = c.queries == 0 ? 0 : (c.queries - 1) / c.chunk + 1;
  struct Result {
    std::vector<float> out, score, added;
    std::vector<int32_t> chosen;
  };
  const auto run = [&](int n, bool judged) {
    Result r{{}, before, std::vector<float>(c.heads * c.more * c.width, untouched),
             std::vector<int32_t>(chunks * c.places, 777)};
    Field out = shape;
    c.out = out.view<MutableHeads>(), c.score = r.score.data(), c.added = r.added.data(), c.chosen = r.chosen.data();
    block_memory_forward(c, n);
    BlockMemoryForward plain = c;  // numbers whose sums the definition can form
    plain.window = std::min(c.window, c.keys + 1), plain.first_tokens = std::min(c.first_tokens, c.keys);
    plain.block = std::min(c.block, c.keys + 1), plain.chunk = std::min(c.chunk, std::max<int64_t>(c.queries, 1));
    if (judged && c.heads > 0) {
      const std::string wrong = test::judge(plain, before, 1e-5);
      require(wrong.empty(), "block memory: " + wrong);
    }
    r.out = out.written("block memory out");
    return r;
  };
  const Result one = run(1, true), other = run(threads, false);
  require(same_bits(one.out, other.out) && same_bits(one.score, other.score) && same_bits(one.added, other.added) &&
              one.chosen == other.chosen,
          "block memory: bits differ with threads");
  return 0;
}
