// Mask atoms as they cross from Python, see `vlm.ops.masks.MaskProgram.lower`.
#pragma once

#include <array>
#include <vector>

#include "bindings.hpp"
#include "vlm/mask.hpp"

namespace vlm::bindings {

using Atom = std::array<int64_t, 12>;  // kind, four numbers; address and strides (batch, head, row) of a; address and
                                       // strides (batch, head) of b

inline std::vector<MaskAtom> mask_atoms(const std::vector<Atom>& list) {
  std::vector<MaskAtom> atoms;
  for (const Atom& t : list)
    atoms.push_back({static_cast<AtomKind>(t[0]), {t[1], t[2], t[3], t[4]}, address<const void>(t[5]), t[6], t[7], t[8],
                     address<const void>(t[9]), t[10], t[11]});
  return atoms;
}

}  // namespace vlm::bindings
