#include "core/memory.hpp"

#include <cstdlib>
#include <limits>
#include <new>

namespace vlm {

float* allocate_floats(int64_t count) {
  if (count < 0 || count > std::numeric_limits<int64_t>::max() / 8) throw std::bad_alloc();
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes == 0 ? 64 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return static_cast<float*>(memory);
}

void release_floats(float* memory) { std::free(memory); }

}  // namespace vlm
