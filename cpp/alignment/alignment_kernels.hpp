// Declarations of the per-level kernels of this family.
#pragma once

#include "vlm/alignment.hpp"

namespace vlm {
namespace VLM_LEVEL {

void alignment_forward(const AlignmentForward& call, int threads);
void alignment_backward(const AlignmentBackward& call, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
