// Checks that every entry makes before a launch.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/device.hpp"

namespace vlm::cuda {

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

inline void require_sizes(const char* name, std::initializer_list<int64_t> sizes) {
  for (int64_t n : sizes)
    if (n < 0) throw std::invalid_argument(std::string(name) + ": negative size");
}

// Kernels take one-dimensional grids; a block index is a 32-bit number.
inline unsigned blocks(int64_t count) {
  require(count <= INT32_MAX, "CUDA: over 2^31 blocks");
  return static_cast<unsigned>(count);
}

}  // namespace vlm::cuda
