#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/half_table.hpp"
#include "vlm/level.hpp"

namespace vlm {
namespace {

bool runs_here(Level level) {
#ifdef VLM_X86
  switch (level) {
    case Level::portable:
      return true;
    case Level::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Level::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(Level::avx2);
    case Level::avx512_bf16:
#ifdef VLM_HALF
      return __builtin_cpu_supports("avx512bf16") && runs_here(Level::avx512);
#else
      return false;
#endif
  }
  return false;
#else
  return level == Level::portable;
#endif
}

const KernelTable* table_of(Level level) {
#ifdef VLM_X86
  if (level == Level::avx512 || level == Level::avx512_bf16) return &avx512::kernel_table;
  if (level == Level::avx2) return &avx2::kernel_table;
#endif
  (void)level;
  return &portable::kernel_table;
}

std::atomic<Level>& current() {
  static std::atomic<Level> level{best_level()};
  return level;
}

}  // namespace

std::vector<Level> supported_levels() {
  std::vector<Level> levels;
  for (Level level : {Level::portable, Level::avx2, Level::avx512, Level::avx512_bf16})
    if (runs_here(level)) levels.push_back(level);
  return levels;
}

Level best_level() {
  static const Level best = supported_levels().back();
  return best;
}

Level active_level() { return current().load(std::memory_order_relaxed); }

void set_level(Level level) {
  if (!runs_here(level))
    throw std::invalid_argument(std::string("level ") + level_name(level) + " does not run on this machine");
  current().store(level, std::memory_order_relaxed);
}

const char* level_name(Level level) {
  switch (level) {
    case Level::portable:
      return "portable";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

Level level_from_name(const char* name) {
  for (Level level : {Level::portable, Level::avx2, Level::avx512, Level::avx512_bf16})
    if (std::strcmp(name, level_name(level)) == 0) return level;
  throw std::invalid_argument(std::string("unknown level '") + name + "'; expected portable, avx2, avx512 or avx512_bf16");
}

const KernelTable& active_kernels() { return *table_of(active_level()); }

const HalfKernels* active_half_kernels() {
#ifdef VLM_HALF
  if (active_level() == Level::avx512_bf16) return &avx512_bf16::half_kernels;
#endif
  return nullptr;
}

bool multiplies_bfloat16() { return active_half_kernels() != nullptr; }

}  // namespace vlm
