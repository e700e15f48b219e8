#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/kernel_table.hpp"
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
  }
  return false;
#else
  return level == Level::portable;
#endif
}

const KernelTable* table_of(Level level) {
#ifdef VLM_X86
  if (level == Level::avx512) return &avx512::kernel_table;
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
  for (Level level : {Level::portable, Level::avx2, Level::avx512})
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
  }
  return "unknown";
}

Level level_from_name(const char* name) {
  for (Level level : {Level::portable, Level::avx2, Level::avx512})
    if (std::strcmp(name, level_name(level)) == 0) return level;
  throw std::invalid_argument(std::string("unknown level '") + name + "'; expected portable, avx2 or avx512");
}

const KernelTable& active_kernels() { return *table_of(active_level()); }

}  // namespace vlm
