// Entries of the contrastive losses on CUDA devices.
#include "cuda/pair_backward.cuh"
#include "cuda/pair_forward.cuh"

namespace vlm::cuda {
namespace {

void check_problem(const PairProblem& p) {
  require_sizes("pair loss", {p.rows, p.columns, p.width});
  require((p.row_ids == nullptr) == (p.column_ids == nullptr),
          "pair loss: ids must be given for rows and columns, or for neither");
}

// The workspace: doubles for sums, then shares, then the parts of columns.
struct Workspace {
  double* sums;
  float *row_share, *column_share;
  void* parts;

  Workspace(const PairProblem& p, void* start) {
    sums = static_cast<double*>(start);
    row_share = reinterpret_cast<float*>(sums + 2 * pieces(p.rows, PAIR_TILE));
    column_share = row_share + p.rows;
    parts = column_share + p.columns;
  }
};

template <PairLoss loss>
void run_gradient(const PairGradient& g, void* stream) {
  if (g.width <= 256) return launch_pair_gradient<loss, 4>(g, stream);
  launch_pair_gradient<loss, 8>(g, stream);
}

}  // namespace

int64_t pair_workspace(const PairProblem& p) {
  check_problem(p);
  const int64_t tiles = pieces(p.rows, PAIR_TILE);
  return 16 * tiles + 4 * (p.rows + p.columns) + static_cast<int64_t>(sizeof(ColumnPart)) * tiles * p.columns;
}

void pair_forward(PairLoss loss, const PairForward& call, void* workspace, void* stream) {
  const PairProblem& p = call.problem;
  check_problem(p);
  const Workspace at(p, workspace);
  const int64_t tiles = pieces(p.rows, PAIR_TILE), column_blocks = pieces(p.columns, TILE_THREADS);
  constexpr std::size_t slices = sizeof(float) * 2 * PAIR_SLICE_FLOATS;
  if (loss == PairLoss::softmax) {
    launch_pair_shares(p, at.row_share, at.column_share, stream);
    ColumnPart* parts = static_cast<ColumnPart*>(at.parts);
    if (tiles > 0)
      VLM_LAUNCH(softmax_forward_kernel, {blocks(tiles)}, {TILE_THREADS},
                 slices + sizeof(ColumnPart) * PAIR_WARPS * PAIR_TILE, stream, call, at.row_share, parts);
    if (column_blocks > 0)
      VLM_LAUNCH(softmax_columns_kernel, {blocks(column_blocks)}, {TILE_THREADS}, 0, stream, call, at.column_share,
                 parts, tiles);
  } else {
    float* parts = static_cast<float*>(at.parts);
    if (tiles > 0)
      VLM_LAUNCH(sigmoid_forward_kernel, {blocks(tiles)}, {TILE_THREADS},
                 slices + sizeof(float) * PAIR_WARPS * PAIR_TILE, stream, call, parts);
    if (column_blocks > 0)
      VLM_LAUNCH(sigmoid_columns_kernel, {blocks(column_blocks)}, {TILE_THREADS}, 0, stream, call, parts, tiles);
  }
}

void pair_backward(PairLoss loss, const PairBackward& call, void* workspace, void* stream) {
  const PairProblem& p = call.problem;
  check_problem(p);
  const Workspace at(p, workspace);
  if (loss == PairLoss::softmax) launch_pair_shares(p, at.row_share, at.column_share, stream);
  const PairSide rows{p.x, p.rows, call.row_lse, call.row_gradient, at.row_share};
  const PairSide columns{p.y, p.columns, call.column_lse, call.column_gradient, at.column_share};
  const auto run = loss == PairLoss::softmax ? run_gradient<PairLoss::softmax> : run_gradient<PairLoss::sigmoid>;
  const float bias = loss == PairLoss::softmax ? 0.0f : p.bias;
  run({rows, columns, positives_of_rows(p), p.width, p.scale, bias, call.dx, at.sums}, stream);
  if (call.dy.data != nullptr)
    run({columns, rows, positives_of_columns(p), p.width, p.scale, bias, call.dy, nullptr}, stream);
  VLM_LAUNCH(pair_sums_kernel, {1}, {32}, 0, stream, at.sums, pieces(p.rows, PAIR_TILE), call.dlog_scale, call.dbias);
}

}  // namespace vlm::cuda
