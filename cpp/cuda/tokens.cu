// Entries of token reduction on CUDA devices: matching, moving and merging rows.
#include "cuda/match.cuh"
#include "cuda/token_rows.cuh"

namespace vlm::cuda {
namespace {

constexpr int64_t ROWS_OF_BLOCK = TILE_THREADS / 32;

int64_t sources_of(const TokenMatch& call) { return (call.length + 1) / 2; }

void check_match(const TokenMatch& c) {
  require_sizes("token match", {c.batch, c.heads, c.length, c.width, c.merged, c.protect});
  require(c.length <= INT32_MAX, "token match: over 2^31 tokens");
  require(c.heads > 0, "token match: no heads");
  require(c.merged <= (c.length > c.protect ? c.length - c.protect : 0) / 2,
          "token match: more merges than half of the unprotected tokens");
}

}  // namespace

int64_t token_match_workspace(const TokenMatch& call) {
  check_match(call);
  const int64_t mean = call.heads > 1 ? call.length * call.width : 0;
  return static_cast<int64_t>(sizeof(float)) * call.batch * (mean + call.length + 3 * sources_of(call));
}

void token_match(const TokenMatch& call, void* workspace, void* stream) {
  check_match(call);
  if (call.batch * call.length == 0) return;
  const int64_t sources = sources_of(call), tokens = call.batch * call.length;
  const bool averaged = call.heads > 1;
  float* mean = static_cast<float*>(workspace);
  float* inverse = mean + (averaged ? tokens * call.width : 0);
  float* best = inverse + tokens;
  int32_t* partner = reinterpret_cast<int32_t*>(best + call.batch * sources);
  const MatchPlan plan{call.batch,
                       call.length,
                       call.width,
                       sources,
                       call.length / 2,
                       call.merged,
                       smaller((call.protect + 1) / 2, sources),
                       call.protect / 2,
                       call.order,
                       averaged ? mean : call.metric,
                       averaged ? call.length * call.width : call.batch_stride,
                       averaged ? call.width : call.row_stride,
                       inverse,
                       best,
                       partner,
                       partner + call.batch * sources};
  if (call.merged > 0 || call.order == MatchOrder::similarity) {
    VLM_LAUNCH(token_norm_kernel, {blocks(pieces(tokens, ROWS_OF_BLOCK))}, {TILE_THREADS}, 0, stream, call, mean,
               inverse);
    VLM_LAUNCH(token_partner_kernel, {blocks(call.batch * pieces(sources, PAIR_TILE))}, {TILE_THREADS},
               sizeof(float) * 2 * PAIR_SLICE_FLOATS, stream, plan);
    VLM_LAUNCH(token_rank_kernel, {blocks(pieces(call.batch * sources, TILE_THREADS))}, {TILE_THREADS}, 0, stream,
               plan);
  }
  VLM_LAUNCH(token_place_kernel, {blocks(pieces(tokens, TILE_THREADS))}, {TILE_THREADS}, 0, stream, call, plan);
}

void token_gather(const TokenGather& call, void* stream) {
  require_sizes("token gather", {call.batch, call.from_length, call.length, call.width});
  require(call.weights == nullptr || call.element_bytes == 4, "token gather: weights want float32");
  const int64_t rows = call.batch * call.length;
  if (rows == 0) return;
  const auto run = [&](void (*kernel)(TokenGather)) {
    VLM_LAUNCH(kernel, {blocks(pieces(rows, ROWS_OF_BLOCK))}, {TILE_THREADS}, 0, stream, call);
  };
  switch (call.element_bytes) {
    case 1: return run(token_gather_kernel<1>);
    case 2: return run(token_gather_kernel<2>);
    case 4: return run(token_gather_kernel<4>);
    case 8: return run(token_gather_kernel<8>);
    default: require(false, "token gather: elements have 1, 2, 4 or 8 bytes");
  }
}

void token_scatter(const TokenScatter& call, void* stream) {
  require_sizes("token scatter", {call.batch, call.from_length, call.length, call.width});
  const int64_t tasks = call.batch * call.length * pieces(call.width, SCATTER_COLUMNS);
  if (tasks > 0)
    VLM_LAUNCH(token_scatter_kernel, {blocks(pieces(tasks, ROWS_OF_BLOCK))}, {TILE_THREADS}, 0, stream, call);
}

void token_weights(const TokenWeights& call, void* stream) {
  require_sizes("token weights", {call.batch, call.length, call.slots});
  const int64_t tasks = call.batch * call.slots;
  if (tasks > 0)
    VLM_LAUNCH(token_weight_kernel, {blocks(pieces(tasks, ROWS_OF_BLOCK))}, {TILE_THREADS}, 0, stream, call);
}

}  // namespace vlm::cuda
