// parallel_ranges with a lambda. Per-level code, see simd.hpp.
#pragma once

#include "core/simd.hpp"
#include "vlm/parallel.hpp"

namespace vlm {
namespace VLM_LEVEL {

template <class Body>
static void call_range(void* context, int64_t begin, int64_t end, int worker) {
  (*static_cast<Body*>(context))(begin, end, worker);
}

template <class Body>
static void parallel_for(int64_t count, int64_t grain, int threads, Body body) {
  parallel_ranges(count, grain, threads, call_range<Body>, &body);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
