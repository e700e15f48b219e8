// Entry of the vocabulary losses: checks, then calls the active level.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/kernel_table.hpp"

namespace vlm {

void cross_entropy_rows(const CrossEntropyRows& call, int threads) {
  if (call.rows < 0 || call.ids < 0) throw std::invalid_argument("cross-entropy rows: negative size");
  if (call.rows > 0 && call.ids == 0) throw std::invalid_argument("cross-entropy rows: no ids to choose from");
  if (!(call.smoothing >= 0.0f && call.smoothing < 1.0f && call.softcap >= 0.0f))
    throw std::invalid_argument("cross-entropy rows: smoothing must be in [0, 1) and the cap not negative");
  if (!std::isfinite(call.z_loss) || !std::isfinite(call.softcap))
    throw std::invalid_argument("cross-entropy rows: the z-loss and the cap must be finite");
  for (int64_t i = 0; i < call.rows; ++i)
    if (call.labels[i] < -1 || call.labels[i] >= call.ids)
      throw std::invalid_argument("cross-entropy rows: a label lies outside of the vocabulary");
  active_kernels().cross_entropy_rows(call, std::max(threads, 1));
}

void divergence_rows(const DivergenceRows& call, int threads) {
  if (call.rows < 0 || call.ids < 0) throw std::invalid_argument("divergence rows: negative size");
  if (call.kind < Divergence::forward || call.kind > Divergence::tv)
    throw std::invalid_argument("divergence rows: unknown kind");
  if (!(call.temperature > 0.0f && std::isfinite(call.temperature)))
    throw std::invalid_argument("divergence rows: the temperature must be positive and finite");
  const bool mixed = call.kind == Divergence::symmetric || call.kind == Divergence::js || call.kind == Divergence::skew;
  if (mixed && !(call.mix > 0.0f && call.mix < 1.0f))
    throw std::invalid_argument("divergence rows: the mixture must be between 0 and 1");
  active_kernels().divergence_rows(call, std::max(threads, 1));
}

}  // namespace vlm
