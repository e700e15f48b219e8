// Arrays as they cross from Python: addresses with strides in elements.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bindings.hpp"
#include "vlm/view.hpp"

namespace vlm::bindings {

using View = std::array<uintptr_t, 4>;       // address, then batch, head and row stride
using Block = std::pair<uintptr_t, int64_t>;  // address, row stride

template <class To, class T>
To view(const View& v) {
  return {address<T>(v[0]), static_cast<int64_t>(v[1]), static_cast<int64_t>(v[2]), static_cast<int64_t>(v[3])};
}
inline Heads input(const View& v) { return view<Heads, const float>(v); }
inline MutableHeads output(const View& v) { return view<MutableHeads, float>(v); }

inline Matrix input(const Block& b) { return {address<const float>(b.first), b.second}; }
inline MutableMatrix output(const Block& b) { return {address<float>(b.first), b.second}; }

}  // namespace vlm::bindings
