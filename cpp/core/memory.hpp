// Aligned work memory. The functions live in a common translation unit; the owner struct is per level.
#pragma once

#include <cstdint>

namespace vlm {

// 64-byte aligned, uninitialised; throws std::bad_alloc.
float* allocate_floats(int64_t count);
void release_floats(float* memory);

}  // namespace vlm
