// The emulation itself: kernels with a planted fault, which it must notice, and the warp operations.
#include "emulated.hpp"

using namespace vlm;
using namespace vlm::cuda;
using namespace vlm::test;

namespace {

constexpr int THREADS = 96, ROUNDS = 3;

// Read after write: each thread reads what another warp wrote.
__global__ void reverse_kernel(const float* in, float* out) {
  VLM_DYN_SMEM(float, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Write after read: the buffer is filled anew in each round.
__global__ void rotate_kernel(const float* in, float* out) {
  VLM_DYN_SMEM(float, shared);
  for (int round = 0; round < ROUNDS; ++round) {
    shared[threadIdx.x] = in[threadIdx.x] + float(round);
    __syncthreads();
    out[round * int(blockDim.x) + int(threadIdx.x)] = shared[(threadIdx.x + 40) % blockDim.x];
    __syncthreads();
  }
}

// Inside a warp.
__global__ void neighbour_kernel(const float* in, float* out) {
  VLM_DYN_SMEM(float, shared);
  for (int round = 0; round < ROUNDS; ++round) {
    shared[threadIdx.x] = in[threadIdx.x] + float(round);
    __syncwarp();
    out[round * int(blockDim.x) + int(threadIdx.x)] = shared[threadIdx.x ^ 1];
    __syncwarp();
  }
}

// Double-buffered asynchronous copies: slice s is read while slice s + 1 is on its way.
__global__ void stream_kernel(const float* in, float* out, int slices) {
  VLM_DYN_SMEM(float, shared);
  const int tid = threadIdx.x, count = blockDim.x;
  copy_async_16(shared + 4 * tid, in + 4 * tid, 16);
  copy_commit();
  float sum = 0.0f;
  for (int s = 0; s < slices; ++s) {
    const float* now = shared + s % 2 * 4 * count;
    if (s + 1 < slices)
      copy_async_16(shared + (s + 1) % 2 * 4 * count + 4 * tid, in + (s + 1) * 4 * count + 4 * tid, 16);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    sum += now[4 * (count - 1 - tid)];
    __syncthreads();
  }
  out[tid] = sum;
}

__global__ void ragged_copy_kernel(const float* in, float* out, int bytes) {
  VLM_DYN_SMEM(float, shared);
  copy_async_16(shared, in, bytes);
  copy_commit();
  copy_wait<0>();
  for (int i = 0; i < 4; ++i) out[i] = shared[i];
}

__global__ void warp_kernel(float* out) {
  const int tid = threadIdx.x;
  float sum = float(tid);
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(all_lanes, sum, bits);
  out[tid] = sum;
  out[blockDim.x + tid] = __shfl_sync(all_lanes, float(tid), 5);
  out[2 * blockDim.x + tid] = float(__ballot_sync(all_lanes, tid % 3 == 0) & 0xffffu);
  out[3 * blockDim.x + tid] = float(__syncthreads_count(tid % 5 == 0));
  float scan = 1.0f;  // half a warp at a time, a different number of steps in each half
  const unsigned half = tid % 32 < 16 ? 0xffffu : 0xffff0000u;
  for (int by = 1; by < (tid % 32 < 16 ? 4 : 16); by *= 2) {
    const float other = __shfl_xor_sync(half, scan, by);
    scan += other;
  }
  out[4 * blockDim.x + tid] = scan;
}

__global__ void uninitialised_kernel(float* out) {
  VLM_DYN_SMEM(float, shared);
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void divergent_kernel(bool ends) {
  if (threadIdx.x < 32) {
    if (ends) return;
    __syncthreads();
    __syncthreads();
  } else {
    __syncthreads();
    __syncthreads();
  }
}
__global__ void masks_kernel() { __syncwarp(threadIdx.x % 2 ? 0xffffffffu : 0x55555555u); }
__global__ void missing_lane_kernel() {
  if (threadIdx.x % 32 != 7) __syncwarp();
}
__global__ void outside_kernel() { __syncwarp(0xffff0000u); }
__global__ void beyond_kernel() {
  VLM_DYN_SMEM(float, shared);
  shared[33 + threadIdx.x] = 1.0f;
}
__global__ void misaligned_kernel(const float* in) {
  VLM_DYN_SMEM(float, shared);
  copy_async_16(shared, in + 1, 16);
}
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  VLM_DYN_SMEM(uint16_t, shared);  // a [16, 16], then b [16, 8 + 8] row by row
  for (int i = threadIdx.x; i < 512; i += 32)
    shared[i] = i < 256 ? a[i] : (i % 16 < 8 ? b[(i - 256) / 16 * 8 + i % 16] : 0);
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t left[4], right[4];
  load_matrices<false>(left, shared + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices<true>(right, shared + 256 + (lane % 16) * 16 + lane / 16 * 8);
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_bf16(sum, left, {right[0], right[1]});
  for (int n = 0; n < 4; ++n) c[(lane / 4 + (n >= 2 ? 8 : 0)) * 8 + 2 * (lane % 4) + n % 2] = sum[n];
}

bool reversed_right(const std::vector<float>& in) {
  std::vector<float> out(THREADS);
  VLM_LAUNCH(reverse_kernel, {1}, {THREADS}, THREADS * 4, nullptr, in.data(), out.data());
  for (int i = 0; i < THREADS; ++i)
    if (out[i] != in[THREADS - 1 - i]) return false;
  return true;
}

template <class Kernel, class Partner>
bool rounds_right(Kernel kernel, const std::vector<float>& in, Partner partner) {
  std::vector<float> out(ROUNDS * THREADS);
  VLM_LAUNCH(kernel, {1}, {THREADS}, THREADS * 4, nullptr, in.data(), out.data());
  for (int r = 0; r < ROUNDS; ++r)
    for (int i = 0; i < THREADS; ++i)
      if (out[r * THREADS + i] != in[partner(i)] + float(r)) return false;
  return true;
}

bool stream_right(const std::vector<float>& in, int slices) {
  std::vector<float> out(THREADS);
  VLM_LAUNCH(stream_kernel, {1}, {THREADS}, 2 * 16 * THREADS, nullptr, in.data(), out.data(), slices);
  for (int i = 0; i < THREADS; ++i) {
    float sum = 0.0f;
    for (int s = 0; s < slices; ++s) sum += in[(s * THREADS + THREADS - 1 - i) * 4];
    if (out[i] != sum) return false;
  }
  return true;
}

void warp_operations(const std::string& mode) {
  std::vector<float> out(5 * THREADS);
  VLM_LAUNCH(warp_kernel, {1}, {THREADS}, 0, nullptr, out.data());
  bool right = true;
  for (int i = 0; i < THREADS; ++i) {
    const int first = i / 32 * 32;
    unsigned votes = 0;
    for (int l = 0; l < 16; ++l) votes |= unsigned((first + l) % 3 == 0) << l;
    right = right && out[i] == float(32 * first + 496) && out[THREADS + i] == float(first + 5) &&
            out[2 * THREADS + i] == float(votes) && out[3 * THREADS + i] == float((THREADS + 4) / 5) &&
            out[4 * THREADS + i] == (i % 32 < 16 ? 4.0f : 16.0f);
  }
  check(right, "warp operations " + mode);
  VLM_LAUNCH(uninitialised_kernel, {1}, {32}, 128, nullptr, out.data());
  check(std::isnan(out[0]) && std::isnan(out[31]), "shared memory starts as NaN " + mode);
}

void tensor_core(const std::string& mode) {
  Numbers numbers(3);
  std::vector<uint16_t> a(256), b(128);
  for (uint16_t& v : a) v = uint16_t(pack_bf16(float(numbers.below(17)) - 8.0f, 0.0f));
  for (uint16_t& v : b) v = uint16_t(pack_bf16(float(numbers.below(17)) - 8.0f, 0.0f));
  std::vector<float> c(128), exact(128, 0.0f);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 16; ++k) exact[i * 8 + j] += float_of_bf16(a[i * 16 + k]) * float_of_bf16(b[k * 8 + j]);
  VLM_LAUNCH(mma_kernel, {1}, {32}, 1024, nullptr, a.data(), b.data(), c.data());
  check(same_bits(c, exact), "ldmatrix and mma of small integers are exact " + mode);
}

}  // namespace

int main() {
  return run_emulated([] {
    const std::vector<float> in = Numbers(1).normal(4 * 4 * THREADS);
    every_barrier_is_needed("reverse", [&] { return reversed_right(in); });
    every_barrier_is_needed("rotate", [&] {
      return rounds_right(rotate_kernel, in, [](int i) { return (i + 40) % THREADS; });
    });
    every_barrier_is_needed("neighbour", [&] {
      return rounds_right(neighbour_kernel, in, [](int i) { return i ^ 1; });
    });
    every_barrier_is_needed("stream", [&] { return stream_right(in, 4); });
    check(emulation::sites.size() == 3, "the stream has two barriers and a wait");
    in_every_mode(warp_operations);
    in_every_mode(tensor_core);
    in_every_mode([&](const std::string& mode) {
      std::vector<float> out(4);
      alignas(16) const float four[4] = {1.0f, 2.0f, 3.0f, 4.0f};
      VLM_LAUNCH(ragged_copy_kernel, {1}, {32}, 16, nullptr, &four[0], out.data(), 8);
      check(out == std::vector<float>({1.0f, 2.0f, 0.0f, 0.0f}), "the rest of a copy is zero " + mode);
    });
    must_abort("divergent barrier", [] { VLM_LAUNCH(divergent_kernel, {1}, {64}, 0, nullptr, false); });
    must_abort("divergent barrier", [] { VLM_LAUNCH(divergent_kernel, {1}, {64}, 0, nullptr, true); });
    must_abort("lanes disagree about __syncwarp", [] { emulation::run_grid({1}, {32}, 0, masks_kernel); });
    must_abort("lanes disagree about __syncwarp", [] { emulation::run_grid({1}, {32}, 0, missing_lane_kernel); });
    must_abort("not in its own mask", [] { emulation::run_grid({1}, {32}, 0, outside_kernel); });
    must_abort("a write beyond the shared memory", [] { emulation::run_grid({1}, {32}, 132, beyond_kernel); });
    must_abort("misaligned asynchronous copy", [&] {
      VLM_LAUNCH(misaligned_kernel, {1}, {32}, 16, nullptr, in.data());
    });
    must_abort("more shared memory than sm_80 has", [] { emulation::run_grid({1}, {32}, 200 * 1024, masks_kernel); });
    must_abort("a block has 32", [] { emulation::run_grid({1}, {33}, 0, masks_kernel); });
  });
}
