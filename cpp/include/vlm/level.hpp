// Instruction-set levels: which copy of the kernels runs.
#pragma once

#include <vector>

namespace vlm {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2 };

// The best level of this machine that was built; found once, when first asked.
Level best_level();

// Levels that this build holds and this machine can run, lowest first.
std::vector<Level> supported_levels();

// The level in force.
Level active_level();

// Force a level; for tests, so that one machine covers all. Throws std::invalid_argument if it cannot run here.
void set_level(Level level);

const char* level_name(Level level);

// Throws std::invalid_argument on an unknown name.
Level level_from_name(const char* name);

}  // namespace vlm
