#include "core/memory.hpp"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "vlm/allocator.hpp"

namespace vlm {

float* allocate_floats(int64_t count) {
  if (count < 0 || count > std::numeric_limits<int64_t>::max() / 8) throw std::bad_alloc();
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<float*>(memory);
}

void release_floats(float* memory) { std::free(memory); }

bool keep_freed_memory(int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument("keep_freed_memory: the size must not be negative");
#ifdef __GLIBC__
  const int limit = static_cast<int>(std::min<int64_t>(bytes, std::numeric_limits<int>::max()));
  return mallopt(M_MMAP_THRESHOLD, limit) == 1 && mallopt(M_TRIM_THRESHOLD, limit) == 1;
#else
  return false;
#endif
}

}  // namespace vlm
