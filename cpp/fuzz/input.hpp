// What a fuzz target is made of: bytes that are read as sizes, strides and choices, tensors whose memory ends with
// their last element, and checks that abort, so that a driver or libFuzzer keeps the input.
//
// Bytes that are used up read as 0, and every choice of 0 is the plainest one: short inputs are small plain calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "vlm/level.hpp"

namespace vlm::fuzz {

using test::error_between;
using test::same_bits;

// The call at hand in words, for the message of a failure.
inline std::string about;

inline std::string words() { return ""; }
template <class Value, class... More>
std::string words(const char* text, Value value, More... more) {
  return std::string(text) + " " + std::to_string(value) + "  " + words(more...);
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz: %s (level %s)\n", what.c_str(), level_name(active_level()));
  std::fflush(stderr);
  std::abort();
}

inline void require(bool ok, const std::string& what) {
  if (!ok) fail(what);
}

template <class A, class B>
void require_close(const std::vector<A>& got, const std::vector<B>& expected, double tolerance,
                   const std::string& what) {
  const double error = error_between(got, expected);
  if (!(error <= tolerance)) fail(what + ": error " + std::to_string(error));
}

class Bytes {
 public:
  Bytes(const uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  uint8_t byte() { return at_ == end_ ? 0 : *at_++; }
  int64_t below(int64_t n) { return n <= 1 ? 0 : (n <= 256 ? byte() : byte() * 256 + byte()) % n; }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t n) { return below(n) == n - 1; }
  uint64_t word() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }
  template <class T, std::size_t n>
  T among(const T (&values)[n]) {
    return values[below(n)];
  }
  // A size of at most `most`: often 0, 1 or beside a border of vectors, tiles and blocks.
  int64_t size(int64_t most) {
    static const int64_t borders[] = {1,  2,  3,  4,  5,  6,  7,  8,  12, 13, 14, 15, 16, 17,
                                      28, 29, 31, 32, 33, 47, 48, 49, 56, 57, 63, 64, 65};
    const int64_t kind = below(8);
    if (kind == 7) return below(4) == 3 ? 0 : 1;
    const int64_t n = kind < 5 ? among(borders) : between(1, most);
    return n > most ? 1 + n % most : n;
  }
  // The level and the threads of a run.
  int threads() { return static_cast<int>(between(2, 4)); }
  void level() {
    static const std::vector<Level> levels = supported_levels();
    set_level(levels[levels.size() - 1 - below(static_cast<int64_t>(levels.size()))]);
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

// Reproducible numbers (splitmix64) that cost less than a distribution of the standard library.
struct Draw {
  uint64_t state;
  explicit Draw(uint64_t seed) : state(seed) {}
  uint64_t next() {
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return n <= 1 ? 0 : static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  // Of either sign, of magnitude 1/4 to 7/4: vectors of them have no length near 0.
  float number() {
    const uint64_t bits = next();
    const float magnitude = 0.25f + 1.5f * static_cast<float>(bits >> 40) * 0x1p-24f;
    return bits & 1 ? magnitude : -magnitude;
  }
  std::vector<float> numbers(int64_t count) {
    std::vector<float> values(count);
    for (float& v : values) v = number();
    return values;
  }
};

constexpr float untouched = -77777.25f;  // in outputs and their gaps before a call

// A tensor [batch, heads, rows, width] with strides; memory ends behind its last element. Gaps of inputs are NaN.
struct Field {
  int64_t batch, heads, rows, width, batch_stride, head_stride, row_stride;
  std::vector<float> data;

  Field(Bytes& in, int64_t b, int64_t h, int64_t n, int64_t w) : batch(b), heads(h), rows(n), width(w) {
    const int64_t gap = in.below(6), batch_gap = in.below(3);
    if (in.below(2) == 0) {
      row_stride = w + gap;
      head_stride = n * row_stride;
      batch_stride = h * head_stride + batch_gap;
    } else {
      head_stride = w + gap;
      row_stride = h * head_stride;
      batch_stride = n * row_stride + batch_gap;
    }
    const bool any = b > 0 && h > 0 && n > 0;
    data.assign(any ? (b - 1) * batch_stride + (h - 1) * head_stride + (n - 1) * row_stride + w : 0, untouched);
  }
  int64_t at(int64_t b, int64_t h, int64_t n) const { return b * batch_stride + h * head_stride + n * row_stride; }
  void fill(Draw& draw) {
    data.assign(data.size(), std::numeric_limits<float>::quiet_NaN());
    each([&](float* row) {
      for (int64_t e = 0; e < width; ++e) row[e] = draw.number();
    });
  }
  template <class Body>
  void each(Body body) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t n = 0; n < rows; ++n) body(data.data() + at(b, h, n));
  }
  template <class View>
  View view() {
    return {data.data(), batch_stride, head_stride, row_stride};
  }
  // The elements in order; then everything else must be what it was.
  std::vector<float> written(const std::string& what) const {
    std::vector<float> rest = data, values;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t n = 0; n < rows; ++n)
          for (int64_t e = 0; e < width; ++e) {
            values.push_back(data[at(b, h, n) + e]);
            rest[at(b, h, n) + e] = untouched;
          }
    for (float x : rest) require(x == untouched, what + ": something between the rows was written");
    return values;
  }
};

// A call that must be refused with std::invalid_argument; anything else that it throws ends the program.
template <class Call>
void require_refused(Call call, const std::string& what) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail(what + " was taken");
}

}  // namespace vlm::fuzz
