// The core's own thread pool. Safe across fork (the child starts with no workers), nested calls run in the caller.
#pragma once

#include <cstdint>

namespace vlm {

// Run body(context, begin, end, worker) over ranges that cover [0, count), on at most `threads` threads, the caller
// among them. `worker` is below `threads` and not shared by two bodies running at once. Ranges hold at most `grain`
// indices. If a body throws, ranges that were not begun are left out, and the first exception comes out of this call when
// all bodies have ended. If the pool is busy with another caller, all of it runs in this thread.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int worker);
void parallel_ranges(int64_t count, int64_t grain, int threads, RangeBody body, void* context);

// Workers alive in this process; for tests.
int pool_size();

}  // namespace vlm
