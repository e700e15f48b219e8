// What kernels need besides plain C++: the CUDA compiler's own, or the emulation of the tests.
//
// VLM_LAUNCH(kernel, grid, block, shared bytes, stream, arguments...) and VLM_DYN_SMEM(type, name) stand for what is no
// C++ (<<<>>> and extern __shared__). Kernels use one-dimensional grids and dynamic shared memory alone.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace vlm::cuda {

inline void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, void* stream,
            Arguments... arguments) {
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of a CUDA kernel");
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch of a CUDA kernel");
}

// The most shared memory that one block may ask for.
inline int64_t block_room(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a device");
  return bytes;
}

__device__ __forceinline__ int population(unsigned bits) { return __popc(bits); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float float_of_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

}  // namespace vlm::cuda

#define VLM_DYN_SMEM(T, name)                                       \
  extern __shared__ __align__(16) unsigned char vlm_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(vlm_dynamic_shared)

#else

#include "cuda/emulation/mma.hpp"

#endif

#define VLM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::vlm::cuda::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#define VLM_DEVICE __device__ __forceinline__
#define VLM_BOTH __host__ __device__ __forceinline__

namespace vlm::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

VLM_BOTH float minus_infinity() { return -INFINITY; }

template <class T>
VLM_BOTH T smaller(T a, T b) {
  return a < b ? a : b;
}
VLM_BOTH int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace vlm::cuda
