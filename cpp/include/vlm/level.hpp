// Instruction-set levels: which copy of the kernels runs.
#pragma once

#include <vector>

namespace vlm {

// avx512_bf16 has the kernels of avx512, and others beside them for tensors stored as bfloat16.
enum class Level : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best level of this machine that was built; found once, when first asked.
Level best_level();

// Levels that this build holds and this machine can run, lowest first.
std::vector<Level> supported_levels();

// The level in force.
Level active_level();

// Force a level; for tests, so that one machine covers all. Throws std::invalid_argument if it cannot run here.
void set_level(Level level);

// Whether the level in force multiplies bfloat16 as it is.
bool multiplies_bfloat16();

const char* level_name(Level level);

// Throws std::invalid_argument on an unknown name.
Level level_from_name(const char* name);

}  // namespace vlm
