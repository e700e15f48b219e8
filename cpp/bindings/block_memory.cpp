#include "vlm/block_memory.hpp"

#include "bindings.hpp"
#include "views.hpp"

namespace py = pybind11;

namespace vlm::bindings {

void register_block_memory(py::module_& m) {
  m.def(
      "block_memory_forward",
      [](const std::array<int64_t, 5>& sizes, const std::array<int64_t, 6>& memory, bool absolute, float scale,
         const View& q, const View& k, const View& v, const Block& cosines, const Block& sines, int64_t table_rows,
         int64_t scored, uintptr_t score, const View& means, int64_t formed, uintptr_t added, int64_t more,
         uintptr_t chosen, int64_t places, const View& out, int threads) {
        const BlockMemoryForward call{sizes[0],  sizes[1],
                                      sizes[2],  sizes[3],
                                      sizes[4],  memory[0],
                                      memory[1], memory[2],
                                      memory[3], memory[4],
                                      memory[5], absolute,
                                      scale,     input(q),
                                      input(k),  input(v),
                                      input(cosines), input(sines),
                                      table_rows, scored,
                                      address<float>(score), input(means),
                                      formed,    address<float>(added),
                                      more,      address<int32_t>(chosen),
                                      places,    output(out)};
        py::gil_scoped_release release;
        block_memory_forward(call, threads);
      },
      py::arg("sizes"), py::arg("memory"), py::arg("absolute"), py::arg("scale"), py::arg("q"), py::arg("k"),
      py::arg("v"), py::arg("cosines"), py::arg("sines"), py::arg("table_rows"), py::arg("scored"), py::arg("score"),
      py::arg("means"), py::arg("formed"), py::arg("added"), py::arg("more"), py::arg("chosen"), py::arg("places"),
      py::arg("out"), py::arg("threads"),
      "Attention with a block memory. sizes: heads, key heads, queries, keys, width; memory: first tokens, window, "
      "block, topk, representatives, chunk. See vlm/block_memory.hpp.");
}

}  // namespace vlm::bindings
