#include "bindings.hpp"
#include "bindings/scan_calls.hpp"
#include "vlm/cuda.hpp"

namespace vlm::cuda {

using namespace bindings;

void register_recurrent(py::module_& m) {
  m.def("linear_scan_shared_bytes", &linear_scan_shared_bytes, py::arg("width"),
        "Shared memory that a block asks for.");
  define_linear_scan<uintptr_t>(
      m, [](const LinearScan& call, uintptr_t on) { linear_scan(call, address<void>(on)); }, py::arg("stream"));
}

}  // namespace vlm::cuda
