// What the token units of one level offer to its kernel table.
#pragma once

#include "core/kernel_table.hpp"

namespace vlm {
namespace VLM_LEVEL {

void token_partners(const TokenMatch& call, float* best, int32_t* partner, int threads);
void token_gather(const TokenGather& call, int threads);
void token_scatter(const TokenScatter& call, const int64_t* starts, const int64_t* members, int threads);

}  // namespace VLM_LEVEL
}  // namespace vlm
