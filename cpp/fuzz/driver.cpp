// Runs a fuzz target without libFuzzer: all files of a corpus, then seeded random inputs.
//
//   fuzz_FAMILY [--runs N] [--seed S] [--keep FILE] [PATH ...]    PATH: an input, or a folder of them
//
// Run r of seed S always gets the same bytes. When a run fails, by a check, a signal or a sanitizer, its bytes are
// written to FILE (fuzz-failure.bin by default) and the number of the run and its bytes are printed; FILE as a PATH
// runs it again.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
// Every sanitizer of GCC and clang has it; null without one.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

// What the handler of a failure reads: no allocation happens there.
const char* keep_path = "fuzz-failure.bin";
char label[512];
const uint8_t* current = nullptr;
std::size_t current_size = 0;

void put(int file, const void* data, std::size_t size) {
  if (write(file, data, size) < 0) return;
}

void keep_input() {
  if (current == nullptr) return;
  const uint8_t* bytes = current;
  current = nullptr;  // once
  const int file = open(keep_path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file >= 0) {
    put(file, bytes, current_size);
    close(file);
  }
  put(2, "\nfailed: ", 9);
  put(2, label, std::strlen(label));
  put(2, "\ncall: ", 7);
  put(2, vlm::fuzz::about.data(), vlm::fuzz::about.size());
  put(2, "\nbytes: ", 8);
  for (std::size_t i = 0; i < current_size; ++i) {
    const char digits[] = "0123456789abcdef", two[2] = {digits[bytes[i] >> 4], digits[bytes[i] & 15]};
    put(2, two, 2);
  }
  put(2, "\nwritten to ", 12);
  put(2, keep_path, std::strlen(keep_path));
  put(2, "\n", 1);
}

}  // namespace

// The undefined-behaviour sanitizer of GCC, which has callbacks of its own, calls this before it ends the program.
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report();
extern "C" void __ubsan_on_report() { keep_input(); }

namespace {

void on_signal(int number) {
  keep_input();
  signal(number, SIG_DFL);
  raise(number);
}

void run(const std::vector<uint8_t>& bytes, const std::string& name) {
  std::snprintf(label, sizeof(label), "%s", name.c_str());
  // A copy of its own: reading past the end of the input is an error that a sanitizer sees.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  static const uint8_t nothing = 0;
  current = exact.empty() ? &nothing : exact.data();
  current_size = exact.size();
  LLVMFuzzerTestOneInput(current, current_size);
  current = nullptr;
}

std::vector<uint8_t> draw(uint64_t seed, uint64_t number) {
  std::seed_seq sequence{uint32_t(seed), uint32_t(seed >> 32), uint32_t(number), uint32_t(number >> 32)};
  std::mt19937 engine(sequence);
  std::vector<uint8_t> bytes(engine() % 192 + 8);
  // Some inputs are sparse: most choices are the plain ones then.
  const uint32_t plain = engine() % 4;
  for (uint8_t& b : bytes) {
    const uint32_t bits = engine();
    b = plain > 1 && (bits >> 8) % 4 < plain - 1 ? 0 : uint8_t(bits);
  }
  return bytes;
}

std::vector<uint8_t> read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t runs = 0, seed = 0;
  std::vector<std::filesystem::path> inputs;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool number = word == "--runs" || word == "--seed";
    if (number || word == "--keep") {
      if (++i == argc) return std::fprintf(stderr, "%s wants a value\n", word.c_str()), 2;
      char* end = nullptr;
      if (word == "--keep") keep_path = argv[i];
      else (word == "--runs" ? runs : seed) = std::strtoull(argv[i], &end, 10);
      if (number && (*argv[i] == 0 || *end != 0)) return std::fprintf(stderr, "%s: not a number\n", argv[i]), 2;
    } else if (word.rfind("--", 0) == 0) {
      return std::fprintf(stderr, "usage: %s [--runs N] [--seed S] [--keep FILE] [PATH ...]\n", argv[0]), 2;
    } else if (std::filesystem::is_directory(word)) {
      for (const auto& entry : std::filesystem::directory_iterator(word))
        if (entry.is_regular_file()) inputs.push_back(entry.path());
    } else {
      inputs.push_back(word);
    }
  }
  std::sort(inputs.begin(), inputs.end());
  for (int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    // A sanitizer's own handler of memory faults stays: it reports, then calls back.
    if (__sanitizer_set_death_callback != nullptr && number != SIGABRT) continue;
    signal(number, on_signal);
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(keep_input);
  for (const auto& path : inputs) run(read(path), path.string());
  for (uint64_t number = 0; number < runs; ++number)
    run(draw(seed, number), "run " + std::to_string(number) + " of seed " + std::to_string(seed));
  std::printf("%zu inputs of files, %" PRIu64 " runs of seed %" PRIu64 ": no failure\n", inputs.size(), runs, seed);
  return 0;
}
