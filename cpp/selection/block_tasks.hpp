// A task for every (batch, head, block of queries), with memory of its worker. Per-level code.
#pragma once

#include "selection/gather.hpp"

namespace vlm {
namespace VLM_LEVEL {

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
    for (int64_t i = begin; i < end; ++i)
      task(call, w, i / blocks / p.query_heads, i / blocks % p.query_heads, i % blocks, blocks);
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
