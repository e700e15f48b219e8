// Selective state-space scan, forward. Compiled once per level.
#include "recurrent/ssm_tiles.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

void run_task(const SsmForward& call, float* memory, int64_t b, int64_t group) {
  const SsmProblem& p = call.problem;
  const int64_t S = p.states, C = p.channels, chunks = (p.length + SSM_CHUNK - 1) / SSM_CHUNK;
  const int64_t blocks = smaller(BLOCKS, (C - group * GROUP + W - 1) / W);
  float *rate = memory, *state = memory + BLOCKS * S * W;
  for (int64_t k = 0; k < blocks; ++k) {
    ssm_to_lanes(p.rate, group * GROUP + k * W, C, S, rate + k * S * W);
    ssm_to_lanes(p.state == nullptr ? nullptr : p.state + b * C * S, group * GROUP + k * W, C, S, state + k * S * W);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = chunk * SSM_CHUNK, end = smaller(p.length, start + SSM_CHUNK);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t c0 = group * GROUP + k * W, lanes = smaller(W, C - c0);
      float *h = state + k * S * W, *a = rate + k * S * W;
      ssm_from_lanes(h, c0, C, S, call.boundaries + (b * chunks + chunk) * C * S);
      const vf skip = load_first(p.skip + c0, lanes);
      for (int64_t t = start; t < end; ++t) {
        if (ssm_begins(p, b, t))
          for (int64_t s = 0; s < S; ++s) store(h + s * W, vf{});
        vf out{};
        if (ssm_exists(p, b, t)) {
          const vf x = load_first(ssm_row(p.x, b, t) + c0, lanes);
          const vf step = softplus(load_first(ssm_row(p.delta, b, t) + c0, lanes)), enters = step * x;
          const float *in = ssm_row(p.b, b, t), *read = ssm_row(p.c, b, t);
          out = skip * x;
          for (int64_t s = 0; s < S; ++s) {
            const vf next = exp(step * load(a + s * W)) * load(h + s * W) + enters * in[s];
            store(h + s * W, next);
            out += next * read[s];
          }
        }
        store_first(call.out + (b * p.length + t) * C + c0, out, lanes);
      }
    }
  }
  for (int64_t k = 0; k < blocks; ++k)
    ssm_from_lanes(state + k * S * W, group * GROUP + k * W, C, S, call.final_state + b * C * S);
}

}  // namespace

void ssm_forward(const SsmForward& call, int threads) {
  const SsmProblem& p = call.problem;
  const int64_t groups = (p.channels + GROUP - 1) / GROUP, room = round_up(2 * BLOCKS * p.states * W + W, W);
  threads = ssm_threads(p, threads);
  Scratch memory(threads * room);
  parallel_for(p.batch * groups, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t task = begin; task < end; ++task)
      run_task(call, memory.data + worker * room, task / groups, task % groups);
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
