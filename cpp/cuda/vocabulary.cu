// Entries of cross-entropy over the vocabulary on CUDA devices.
#include "cuda/vocabulary.cuh"

namespace vlm::cuda {
namespace {

void check_problem(const VocabularyProblem& p) {
  require_sizes("vocabulary", {p.rows, p.ids, p.width});
  require(p.rows == 0 || p.ids > 0, "vocabulary: no ids to choose from");
  require(p.smoothing >= 0.0f && p.smoothing < 1.0f && p.softcap >= 0.0f,
          "vocabulary: smoothing must be in [0, 1) and the cap not negative");
}

}  // namespace

int64_t vocabulary_workspace(const VocabularyProblem& p) {
  check_problem(p);
  return p.rows * (static_cast<int64_t>(sizeof(RowPart)) * pieces(p.ids, VOCABULARY_CHUNK) +
                   static_cast<int64_t>(sizeof(float)));
}

void vocabulary_forward(const VocabularyForward& call, void* workspace, void* stream) {
  const VocabularyProblem& p = call.problem;
  check_problem(p);
  if (p.rows == 0) return;
  const int64_t chunks = pieces(p.ids, VOCABULARY_CHUNK);
  RowPart* parts = static_cast<RowPart*>(workspace);
  float* own_logits = reinterpret_cast<float*>(parts + chunks * p.rows);
  VLM_LAUNCH(vocabulary_forward_kernel, {blocks(pieces(p.rows, PAIR_TILE) * chunks)}, {TILE_THREADS},
             sizeof(float) * 2 * PAIR_SLICE_FLOATS, stream, p, parts, own_logits);
  VLM_LAUNCH(vocabulary_rows_kernel, {blocks(pieces(p.rows, TILE_THREADS))}, {TILE_THREADS}, 0, stream, call, parts,
             own_logits);
}

void vocabulary_backward(const VocabularyBackward& call, void* stream) {
  check_problem(call.problem);
  const bool narrow = call.problem.width <= 256;
  if (call.dhidden.data != nullptr)
    narrow ? launch_vocabulary_gradient<false, 4>(call, stream) : launch_vocabulary_gradient<false, 8>(call, stream);
  if (call.dweight.data != nullptr || call.dbias != nullptr)
    narrow ? launch_vocabulary_gradient<true, 4>(call, stream) : launch_vocabulary_gradient<true, 8>(call, stream);
}

}  // namespace vlm::cuda
