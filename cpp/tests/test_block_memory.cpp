// Block memory: rows in one call and in several against the definition in double, threads, refusals.
#include "block_memory_oracle.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Sizes {
  int64_t H, G, T, D, first_tokens, window, block, topk, representatives, chunk;
  bool absolute;
};

std::string name(const Sizes& s) {
  return "H" + std::to_string(s.H) + " T" + std::to_string(s.T) + " D" + std::to_string(s.D) + " window " +
         std::to_string(s.window) + " block " + std::to_string(s.block) + " chunk " + std::to_string(s.chunk);
}

// A row that is read in calls, with what is kept between them.
struct Reader {
  Sizes s;
  std::vector<float> q, k, v, out, score, means, added;
  std::vector<int32_t> chosen;
  Angles angles;
  int64_t read = 0, formed = 0;

  explicit Reader(const Sizes& sizes)
      : s(sizes), angles(std::max(sizes.T, sizes.window + sizes.chunk), sizes.D) {
    Numbers numbers(11);
    q = numbers.normal(s.H * s.T * s.D);
    k = numbers.normal(s.G * s.T * s.D);
    v = numbers.normal(s.G * s.T * s.D);
    out.assign(s.H * s.T * s.D, -7.0f);
  }
  BlockMemoryForward call(int64_t n) {
    BlockMemoryForward c{};
    c.heads = s.H, c.key_heads = s.G, c.queries = n, c.keys = read + n, c.width = s.D;
    c.first_tokens = s.first_tokens, c.window = s.window, c.block = s.block, c.topk = s.topk;
    c.representatives = s.representatives, c.chunk = s.chunk, c.absolute = s.absolute, c.scale = 0.4f;
    c.q = {q.data() + read * s.D, 0, s.T * s.D, s.D};
    c.k = {k.data(), 0, s.T * s.D, s.D};
    c.v = {v.data(), 0, s.T * s.D, s.D};
    c.out = {out.data() + read * s.D, 0, s.T * s.D, s.D};
    c.cosines = {angles.cosines.data(), s.D / 2};
    c.sines = {angles.sines.data(), s.D / 2};
    c.table_rows = std::max(s.T, s.window + s.chunk);
    c.scored = read;
    c.formed = formed;
    c.more = memory_blocks(c, last_chunk(c)) - formed;
    c.places = std::min(s.topk, formed + c.more);
    std::vector<float> grown(s.H * c.keys, 0.0f);
    for (int64_t h = 0; h < s.H; ++h) std::copy_n(score.begin() + h * read, read, grown.begin() + h * c.keys);
    score = grown;
    added.assign(s.H * c.more * s.D, -7.0f);
    chosen.assign((n + s.chunk - 1) / s.chunk * c.places, -7);
    c.means = {means.data(), 0, formed * s.D, s.D};
    c.added = added.data(), c.score = score.data(), c.chosen = chosen.data();
    return c;
  }
  void take(int64_t n, int threads, bool judged) {
    const BlockMemoryForward c = call(n);
    const std::vector<float> before = score;
    block_memory_forward(c, threads);
    if (judged) {
      const std::string wrong = judge(c, before, 3e-6);
      check(wrong.empty(), name(s) + " behind " + std::to_string(read) + ": " + wrong);
    }
    std::vector<float> grown;
    for (int64_t h = 0; h < s.H; ++h) {
      grown.insert(grown.end(), means.begin() + h * formed * s.D, means.begin() + (h + 1) * formed * s.D);
      grown.insert(grown.end(), added.begin() + h * c.more * s.D, added.begin() + (h + 1) * c.more * s.D);
    }
    means = grown;
    formed += c.more;
    read += n;
  }
};

void whole_and_in_pieces(const Sizes& s) {
  Reader whole(s), threads(s), pieces(s);
  whole.take(s.T, 1, true);
  threads.take(s.T, 3, false);
  check(same_bits(whole.out, threads.out) && same_bits(whole.score, threads.score) && same_bits(whole.means, threads.means) &&
            whole.chosen == threads.chosen,
        name(s) + ": threads");
  for (int64_t n : {s.T / 2, int64_t{1}, int64_t{0}, int64_t{1}}) pieces.take(std::min(n, s.T - pieces.read), 2, true);
  pieces.take(s.T - pieces.read, 2, true);
}

void refused() {
  const Sizes s{2, 1, 40, 4, 2, 8, 4, 1, 2, 4, false};
  using Change = void (*)(BlockMemoryForward&);
  const std::pair<const char*, Change> changes[] = {
      {"negative size", [](BlockMemoryForward& c) { c.heads = -1; }},
      {"no key heads", [](BlockMemoryForward& c) { c.key_heads = 0; }},
      {"heads", [](BlockMemoryForward& c) { c.heads = 3, c.key_heads = 2; }},
      {"odd width", [](BlockMemoryForward& c) { c.width = 3; }},
      {"chunk above window", [](BlockMemoryForward& c) { c.chunk = 9; }},
      {"no block", [](BlockMemoryForward& c) { c.block = 0; }},
      {"more queries than keys", [](BlockMemoryForward& c) { c.queries = 41; }},
      {"new blocks", [](BlockMemoryForward& c) { ++c.more; }},
      {"formed early", [](BlockMemoryForward& c) { ++c.formed, --c.more; }},
      {"places", [](BlockMemoryForward& c) { --c.places; }},
      {"angles", [](BlockMemoryForward& c) { c.table_rows = 11; }},
      {"scores of what is not there", [](BlockMemoryForward& c) { c.scored = 1; }},
  };
  for (const auto& [what, change] : changes) {
    Reader reader(s);
    BlockMemoryForward c = reader.call(s.T);
    change(c);
    check_refused(what, [&] { block_memory_forward(c, 1); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    //                   H  G  T   D  first window block topk reps chunk absolute
    whole_and_in_pieces({1, 1, 1, 2, 0, 1, 1, 0, 1, 1, false});
    whole_and_in_pieces({4, 2, 97, 8, 4, 16, 4, 2, 2, 7, false});
    whole_and_in_pieces({4, 2, 97, 8, 4, 16, 4, 100, 4, 8, true});
    whole_and_in_pieces({3, 1, 140, 36, 3, 17, 5, 3, 2, 17, false});
    whole_and_in_pieces({2, 2, 64, 6, 70, 9, 3, 1, 1, 5, false});
    whole_and_in_pieces({2, 1, 61, 4, 0, 8, 1, 0, 1, 1, false});
    whole_and_in_pieces({6, 2, 700, 18, 5, 290, 20, 20, 3, 33, false});
    whole_and_in_pieces({2, 1, 5, 0, 1, 2, 1, 1, 1, 1, false});
    whole_and_in_pieces({0, 1, 9, 4, 1, 2, 1, 1, 1, 1, false});
    refused();
  });
}
