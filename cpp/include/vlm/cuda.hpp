// Operators on CUDA devices. Every pointer is device memory; last axes are contiguous; strides count elements.
//
// `stream` is a cudaStream_t. Calls return once the kernels are launched; nothing is allocated: a caller gives
// `workspace` of at least the bytes asked for, aligned to 16 bytes, which may be reused once the stream has passed.
// Results do not depend on the order in which blocks run. All throw std::invalid_argument on what the kernels do not
// take and std::runtime_error with CUDA's words if a launch fails.
//
// Numerics: float32 products and sums unless said otherwise; no tensor cores, no TF32.
#pragma once

#include <cstdint>

#include "vlm/attention.hpp"
#include "vlm/attention_statistics.hpp"
#include "vlm/contrastive.hpp"
#include "vlm/recurrent.hpp"
#include "vlm/tokens.hpp"
#include "vlm/view.hpp"

namespace vlm::cuda {

// ---- exact attention
//
// The problem is that of vlm/attention.hpp, with arrays on the device; D and V at most 256. The mask atoms themselves
// (`atoms`, at most 8) lie on the host, what they point to on the device, and is trusted: values are not checked.
// `relative` is taken without a grid and without a bias; ALiBi is such a table. Softcap, temperature and dropout are
// refused.
//
// With `half`, q, k, v, out and their gradients are bf16 and multiplied on tensor cores: products of bf16, sums in
// float32, probabilities (backward: their gradients, too) rounded to bf16 for the second product, gradients rounded once.
// Then D and V are at most 128, a bias or a table has no gradient, and data of q, k, v and dout is aligned to 16 bytes
// with strides that are multiples of 8, so that rows can be copied in pieces of 16 bytes.
using vlm::AttentionBackward;
using vlm::AttentionForward;
using vlm::AttentionProblem;

// Room for the covers of the mask: a byte for each 32 x 32 pairs where there are atoms, else 0.
int64_t attention_forward_workspace(const AttentionProblem& problem);
void attention_forward(const AttentionForward& call, void* workspace, void* stream);
int64_t attention_backward_workspace(const AttentionProblem& problem);
void attention_backward(const AttentionBackward& call, void* workspace, void* stream);

// The most shared memory that a block of any of the kernels for this problem asks for; a device may have less.
int64_t attention_shared_bytes(const AttentionProblem& problem);
int64_t device_shared_bytes(int device);

// ---- column sums of attention
//
// The call is that of vlm/attention_statistics.hpp. The workspace is that of attention_forward.
using vlm::AttentionColumnSums;

void attention_column_sums(const AttentionColumnSums& call, void* workspace, void* stream);

// ---- contrastive losses
//
// Rows x [R, E], columns y [C, E], z_ij = scale <x_i, y_j> (+ bias for the sigmoid loss). Pair (i, j) is positive if
// row_ids[i] == column_ids[j]; without ids if j == i + row_offset.
// Softmax: rows[i] = logsumexp_j z_ij - mean of z_ij over the positives of row i, 0 if it has none; columns likewise.
// Sigmoid: rows[i] and columns[j] are the sums of softplus(-t z_ij), t = +1 on positives and -1 elsewhere.
// Backward takes the gradient of every value. Logits are recomputed; no [R, C] buffer exists, but the workspace holds
// 12 bytes for each column and 64 rows.
using vlm::PairLoss;

struct PairProblem {
  int64_t rows, columns, width;
  Matrix x, y;
  float scale;
  float bias;                 // sigmoid only
  const int64_t* row_ids;     // [rows] or null
  const int64_t* column_ids;  // [columns] or null, together with row_ids
  int64_t row_offset;         // used without ids
};

struct PairForward {
  PairProblem problem;
  float* row_values;     // [rows]
  float* column_values;  // [columns]
  float* row_lse;        // [rows], softmax only: logsumexp_j z_ij
  float* column_lse;     // [columns], softmax only
};

struct PairBackward {
  PairProblem problem;
  const float* row_lse;  // softmax only
  const float* column_lse;
  const float* row_gradient;     // [rows]
  const float* column_gradient;  // [columns]
  MutableMatrix dx;              // [rows, width], data may be null if not wanted
  MutableMatrix dy;              // [columns, width], data may be null
  double* dlog_scale;            // one number on the device
  double* dbias;                 // one number on the device
};

int64_t pair_workspace(const PairProblem& problem);
void pair_forward(PairLoss loss, const PairForward& call, void* workspace, void* stream);
void pair_backward(PairLoss loss, const PairBackward& call, void* workspace, void* stream);

// ---- cross-entropy over the vocabulary
//
// Products <h_i, w_v> of rows h [R, E] and w [V, E]; logits, losses and gradients are those of vlm/vocabulary.hpp. No
// buffer of logits exists: the workspace holds 12 bytes for each row and 1024 ids, and 4 for each row. A label lies in
// -1 .. V - 1 (-1 for none) and is trusted.
struct VocabularyProblem {
  int64_t rows, ids, width;
  Matrix hidden, weight;
  const float* bias;                 // [ids] or null
  const int64_t* labels;             // [rows]
  float smoothing, z_loss, softcap;  // softcap 0: none
};

struct VocabularyForward {
  VocabularyProblem problem;
  float *loss, *log_p, *lse;  // [rows] each
};

struct VocabularyBackward {
  VocabularyProblem problem;
  const float* lse;
  const float* factors;    // [rows], the gradient of each loss, or null for 1
  MutableMatrix dhidden;   // [rows, width], data null if not wanted
  MutableMatrix dweight;   // [ids, width], data null if not wanted
  float* dbias;            // [ids], null if not wanted
};

int64_t vocabulary_workspace(const VocabularyProblem& problem);
void vocabulary_forward(const VocabularyForward& call, void* workspace, void* stream);
void vocabulary_backward(const VocabularyBackward& call, void* stream);

// ---- linear attention with decay
//
// The call is that of vlm/recurrent.hpp, with chunks of LINEAR_CHUNK positions and without `keep` and `run`. D at most
// 128.
using vlm::LinearScan;

constexpr int64_t LINEAR_CHUNK = 64;

void linear_scan(const LinearScan& call, void* stream);

// The shared memory that a block asks for where q and k are `width` wide.
int64_t linear_scan_shared_bytes(int64_t width);

// ---- token reduction
//
// Calls are those of vlm/tokens.hpp, with arrays on the device. Indices there are trusted: values are not checked.
using vlm::MatchOrder;
using vlm::TokenGather;
using vlm::TokenMatch;
using vlm::TokenScatter;
using vlm::TokenSelect;
using vlm::TokenWeights;

int64_t token_match_workspace(const TokenMatch& call);
void token_match(const TokenMatch& call, void* workspace, void* stream);
void token_select(const TokenSelect& call, void* stream);
void token_gather(const TokenGather& call, void* stream);  // elements of 1, 2, 4 or 8 bytes
void token_scatter(const TokenScatter& call, void* stream);
void token_weights(const TokenWeights& call, void* stream);

}  // namespace vlm::cuda
