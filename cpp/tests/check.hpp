// A few lines of test support: named checks, the level argument, reproducible numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "vlm/level.hpp"

namespace vlm::test {

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

// max |a - b| <= tolerance * max(1, max |b|); infinities must agree exactly, NaN never passes.
template <class A, class B>
double error_between(const std::vector<A>& a, const std::vector<B>& b) {
  if (a.size() != b.size()) return INFINITY;
  double worst = 0.0, largest = 1.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::isinf(double(b[i]))) {
      if (double(a[i]) != double(b[i])) return INFINITY;
      continue;
    }
    const double difference = std::fabs(double(a[i]) - double(b[i]));
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
    largest = std::fmax(largest, std::fabs(double(b[i])));
  }
  return worst / largest;
}

template <class A, class B>
void check_close(const std::vector<A>& got, const std::vector<B>& expected, double tolerance, const std::string& what) {
  const double error = error_between(got, expected);
  check(error <= tolerance, what + ": error " + std::to_string(error * 1e6) + "e-6");
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

template <class Body>
void check_refused(const std::string& what, Body body) {
  try {
    body();
  } catch (const std::invalid_argument&) {
    return;
  }
  check(false, what + " is not refused");
}

struct Numbers {
  std::mt19937_64 engine;
  explicit Numbers(uint64_t seed) : engine(seed) {}
  std::vector<float> normal(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> draw(0.0f, scale);
    std::vector<float> values(count);
    for (float& v : values) v = draw(engine);
    return values;
  }
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
};

// Runs `body` at the level named by --level NAME; 77 (skipped) if it does not run on this machine.
template <class Body>
int run(int argc, char** argv, Body body) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--level") != 0) continue;
    try {
      set_level(level_from_name(argv[i + 1]));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "skipped: %s\n", error.what());
      return 77;
    }
  }
  body();
  std::printf("level %s: %d failures\n", level_name(active_level()), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace vlm::test
