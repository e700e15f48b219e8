// Selective state-space scan, backward: chunks from the last to the first, states inside a chunk computed again.
// Compiled once per level.
//
// With g_t the gradient of h_t: g_t = a_{t+1} g_{t+1} + c_t dout_t. Gradients of b and c are sums over channels: each
// task has a part of its own, and the parts are added in the order of the groups.
#include "recurrent/ssm_tiles.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// What one worker owns; [S][W] is a block of states.
struct Worker {
  float *rate, *gradient, *drate, *drate_here;    // [BLOCKS][S][W] (drate_here: [S][W])
  float *dskip;                                   // [BLOCKS][W]
  float *before, *decay;                          // [SSM_CHUNK][S][W]: states before a position and their factors
  float *db, *dc;                                 // [SSM_CHUNK][S][W]: sums over the blocks, lanes apart
  float *now;                                     // [S][W]

  static int64_t room(int64_t S, Worker* w, float* at) {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(floats, W) + W;
      return place;
    };
    w->rate = take(BLOCKS * S * W);
    w->gradient = take(BLOCKS * S * W);
    w->drate = take(BLOCKS * S * W);
    w->drate_here = take(S * W);
    w->dskip = take(BLOCKS * W);
    w->before = take(SSM_CHUNK * S * W);
    w->decay = take(SSM_CHUNK * S * W);
    w->db = take(SSM_CHUNK * S * W);
    w->dc = take(SSM_CHUNK * S * W);
    w->now = take(S * W);
    return used;
  }
};

void clear(float* at, int64_t count) {
  for (int64_t i = 0; i < count; i += W) store(at + i, vf{});
}

// States before every position of [start, end) and their factors, from the state before the chunk.
void recompute(const SsmProblem& p, Worker& w, const float* boundary, const float* rate, int64_t b, int64_t c0,
               int64_t start, int64_t end) {
  const int64_t S = p.states, lanes = smaller(W, p.channels - c0);
  ssm_to_lanes(boundary, c0, p.channels, S, w.now);
  for (int64_t t = start; t < end; ++t) {
    float *before = w.before + (t - start) * S * W, *decay = w.decay + (t - start) * S * W;
    if (ssm_begins(p, b, t)) clear(w.now, S * W);
    if (!ssm_exists(p, b, t)) continue;
    const vf step = softplus(load_first(ssm_row(p.delta, b, t) + c0, lanes));
    const vf enters = step * load_first(ssm_row(p.x, b, t) + c0, lanes);
    const float* in = ssm_row(p.b, b, t);
    for (int64_t s = 0; s < S; ++s) {
      const vf state = load(w.now + s * W), a = exp(step * load(rate + s * W));
      store(before + s * W, state);
      store(decay + s * W, a);
      store(w.now + s * W, a * state + enters * in[s]);
    }
  }
}

void run_block(const SsmBackward& call, Worker& w, int64_t b, int64_t k, int64_t c0, int64_t start, int64_t end) {
  const SsmProblem& p = call.problem;
  const int64_t S = p.states, C = p.channels, lanes = smaller(W, C - c0);
  const float* rate = w.rate + k * S * W;
  float* g = w.gradient + k * S * W;
  const vf skip = load_first(p.skip + c0, lanes);
  vf dskip{};  // sums of a chunk first: fewer roundings against a large total
  clear(w.drate_here, S * W);
  for (int64_t t = end - 1; t >= start; --t) {
    vf dx{}, ddelta{};
    if (ssm_exists(p, b, t)) {
      const vf x = load_first(ssm_row(p.x, b, t) + c0, lanes), dout = load_first(ssm_row(call.dout, b, t) + c0, lanes);
      const vf raw = load_first(ssm_row(p.delta, b, t) + c0, lanes), step = softplus(raw), enters = step * x;
      const float *in = ssm_row(p.b, b, t), *read = ssm_row(p.c, b, t);
      const int64_t at = (t - start) * S * W;
      vf denters{}, dstep{};
      for (int64_t s = 0; s < S; ++s) {
        const vf a = load(w.decay + at + s * W), faded = a * load(w.before + at + s * W);
        const vf own = load(g + s * W) + dout * read[s], through = own * faded;
        store(w.dc + at + s * W, load(w.dc + at + s * W) + dout * (faded + enters * in[s]));
        store(w.db + at + s * W, load(w.db + at + s * W) + own * enters);
        denters += own * in[s];
        dstep += through * load(rate + s * W);
        store(w.drate_here + s * W, load(w.drate_here + s * W) + through * step);
        store(g + s * W, own * a);
      }
      dx = denters * step + skip * dout;
      ddelta = (dstep + denters * x) * sigmoid(raw);
      dskip += dout * x;
    }
    store_first(call.dx + (b * p.length + t) * C + c0, dx, lanes);
    store_first(call.ddelta + (b * p.length + t) * C + c0, ddelta, lanes);
    if (ssm_begins(p, b, t)) clear(g, S * W);
  }
  store(w.dskip + k * W, load(w.dskip + k * W) + dskip);
  for (int64_t i = 0; i < S * W; i += W) {
    float* sum = w.drate + k * S * W + i;
    store(sum, load(sum) + load(w.drate_here + i));
  }
}

void run_task(const SsmBackward& call, Worker& w, int64_t b, int64_t group, float* db, float* dc, float* drate,
              float* dskip) {
  const SsmProblem& p = call.problem;
  const int64_t S = p.states, C = p.channels, chunks = (p.length + SSM_CHUNK - 1) / SSM_CHUNK;
  const int64_t blocks = smaller(BLOCKS, (C - group * GROUP + W - 1) / W);
  clear(w.drate, BLOCKS * S * W);
  clear(w.dskip, BLOCKS * W);
  for (int64_t k = 0; k < blocks; ++k) {
    ssm_to_lanes(p.rate, group * GROUP + k * W, C, S, w.rate + k * S * W);
    ssm_to_lanes(call.dfinal + b * C * S, group * GROUP + k * W, C, S, w.gradient + k * S * W);
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * SSM_CHUNK, end = smaller(p.length, start + SSM_CHUNK);
    clear(w.db, (end - start) * S * W);
    clear(w.dc, (end - start) * S * W);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t c0 = group * GROUP + k * W;
      recompute(p, w, call.boundaries + (b * chunks + chunk) * C * S, w.rate + k * S * W, b, c0, start, end);
      run_block(call, w, b, k, c0, start, end);
    }
    for (int64_t i = 0; i < (end - start) * S; ++i) {
      db[start * S + i] = sum_lanes(load(w.db + i * W));
      dc[start * S + i] = sum_lanes(load(w.dc + i * W));
    }
  }
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t c0 = group * GROUP + k * W;
    ssm_from_lanes(w.gradient + k * S * W, c0, C, S, call.dstate + b * C * S);
    ssm_from_lanes(w.drate + k * S * W, c0, C, S, drate + b * C * S);
    store_first(dskip + b * C + c0, load(w.dskip + k * W), C - c0);
  }
}

// to[i] = sum over parts of from[part * count + i], in their order.
void add_parts(const float* from, int64_t parts, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += from[part * count + i];
    to[i] = static_cast<float>(sum);
  }
}

}  // namespace

void ssm_backward(const SsmBackward& call, int threads) {
  const SsmProblem& p = call.problem;
  const int64_t groups = (p.channels + GROUP - 1) / GROUP, positions = p.batch * p.length * p.states;
  threads = ssm_threads(p, threads);
  Worker sizes;
  const int64_t room = Worker::room(p.states, &sizes, nullptr);
  Scratch memory(threads * room), parts(2 * groups * positions + p.batch * p.channels * (p.states + 1));
  float *db = parts.data, *dc = db + groups * positions, *drate = dc + groups * positions;
  float* dskip = drate + p.batch * p.channels * p.states;
  parallel_for(p.batch * groups, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    Worker w;
    Worker::room(p.states, &w, memory.data + worker * room);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, group = task % groups, place = group * positions + b * p.length * p.states;
      run_task(call, w, b, group, db + place, dc + place, drate, dskip);
    }
  });
  add_parts(db, groups, positions, call.db);
  add_parts(dc, groups, positions, call.dc);
  add_parts(drate, p.batch, p.channels * p.states, call.drate);
  add_parts(dskip, p.batch, p.channels, call.dskip);
}

}  // namespace VLM_LEVEL
}  // namespace vlm
