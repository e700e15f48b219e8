// A task for every (batch, head, block of queries), with memory of its worker. Per-level code.
#pragma once

#include "selection/gather.hpp"

namespace vlm {
namespace VLM_LEVEL {

// Task number `task` of `blocks` blocks of queries for each head. Query heads that read the same keys follow one
// another block by block: the first halves that they judge are the same, and so are the first keys and the window.
struct Place {
  int64_t b, h, block;
};
VLM_INLINE Place place_of(const SelectionProblem& p, int64_t task, int64_t blocks) {
  const int64_t group = p.query_heads / p.key_heads, pair = task / group / blocks;
  return {pair / p.key_heads, pair % p.key_heads * group + task % group, task / group % blocks};
}

// Worker::room(call, &worker, at) lays a worker out from `at`, measures with nullptr, and returns its floats.
// task(call, worker, b, h, block, blocks) runs once each, in any order.
template <class Worker, class Call, class Task>
static void for_each_block(const Call& call, int threads, Task task) {
  const SelectionProblem& p = call.problem;
  const int64_t blocks = (p.queries + p.block_q - 1) / p.block_q;
  Worker sizes;
  const int64_t room = Worker::room(call, &sizes, nullptr);
  Scratch memory(threads * room);
  parallel_for(p.batch * p.query_heads * blocks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    Worker w;
    Worker::room(call, &w, memory.data + worker * room);
    for (int64_t i = begin; i < end; ++i) {
      const Place at = place_of(p, i, blocks);
      task(call, w, at.b, at.h, at.block, blocks);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
