// CUDA kernels on the CPU, for tests: every CUDA thread of a block is a fiber, and blocks run one after another on the
// calling thread.
//
// Scheduling is warp-greedy: a lane runs until it waits, a warp until all its lanes wait at a barrier of the block. So
// a warp runs as far ahead of the others as the barriers allow, and a missing barrier shows. Mode::reversed takes
// warps, lanes and blocks in the opposite order. Asynchronous copies land when they are waited for, or (Mode::eager) at
// once: hardware may do either. Shared memory starts as NaN.
//
// What a GPU leaves undefined ends the process with a message: barriers that not all threads of a block reach at the
// same place, lanes that disagree about a warp operation, writes beyond the shared memory, misaligned copies.
// Not covered: the memory model, timing, divergence inside a warp without _sync operations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace vlm::emulation {

using Site = std::pair<std::string, int>;  // file and line of a barrier

struct Mode {
  bool eager = false, reversed = false;
  Site without;  // the barrier or wait at this place does nothing: a planted fault
  std::string name() const {
    return std::string(eager ? "eager" : "lazy") + (reversed ? " reversed" : " forward");
  }
};
inline Mode mode;
inline bool recording = false;
inline std::set<Site> sites;  // every barrier and wait reached while recording

constexpr std::size_t stack_bytes = 64 * 1024, shared_limit = 163 * 1024;
constexpr uint64_t canary = 0x5bd1e995cafef00dull;

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA emulation: block %u thread %u: %s\n", blockIdx.x, threadIdx.x, message.c_str());
  std::abort();
}

enum class Wait : uint8_t { none, warp, block, ended };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  Wait wait = Wait::none;
  const char* operation = "";  // what it waits for
  const char* file = "";
  int line = 0;
  unsigned mask = 0, parities = 0;  // of a warp operation: members, and which half of each member's slot holds it
  bool parity = false, vote = false;
  alignas(16) unsigned char slot[2][32];
  std::vector<Copy> copies;
  int group = 0;  // copy groups committed so far
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber scheduler;
  std::size_t threads = 0, current = 0;
  std::vector<unsigned char> shared;
  std::size_t shared_bytes = 0;
  int votes = 0;
  std::function<void()> body;
};
inline Machine machine;

inline Fiber& self() { return *machine.fibers[machine.current]; }

#if defined(__x86_64__)
__attribute__((naked, noipa)) static void swap_stacks(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void swap_to(Fiber& from, Fiber& to) { swap_stacks(&from.context, to.context); }
#else
inline void swap_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

inline void run_fiber() {
  machine.body();
  self().wait = Wait::ended;
  swap_to(self(), machine.scheduler);
  std::abort();  // an ended fiber is never resumed
}

inline void prepare(Fiber& f) {
  std::memcpy(f.stack.get(), &canary, sizeof canary);
  f.wait = Wait::none;
  f.parity = false;
  f.copies.clear();
  f.group = 0;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(f.stack.get() + stack_bytes) & ~uintptr_t(15);
  auto* words = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the entry, and a null return address
  std::memset(words, 0, 8 * sizeof *words);
  words[6] = reinterpret_cast<uintptr_t>(&run_fiber);
  f.context = words;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = stack_bytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
#endif
}

// Leave the running fiber until the scheduler lets it go on.
inline void block_on(Wait wait, const char* operation, const char* file, int line) {
  Fiber& f = self();
  f.wait = wait;
  f.operation = operation;
  f.file = file;
  f.line = line;
  swap_to(f, machine.scheduler);
}

inline bool left_out(const char* file, int line) {
  if (recording) sites.emplace(file, line);
  return line == mode.without.second && file == mode.without.first;
}

inline void resume(std::size_t thread) {
  machine.current = thread;
  threadIdx = {unsigned(thread), 0, 0};
  Fiber& f = *machine.fibers[thread];
  swap_to(machine.scheduler, f);
  if (std::memcmp(f.stack.get(), &canary, sizeof canary) != 0) fail("stack of a thread overflowed");
}

// Let go the lanes of a warp whose operation has all its members; true if there were any.
inline bool complete_operations(std::size_t first) {
  bool any = false;
  for (std::size_t lane = 0; lane < 32; ++lane) {
    Fiber& f = *machine.fibers[first + lane];
    if (f.wait != Wait::warp) continue;
    bool all = true;
    unsigned parities = 0;
    for (std::size_t l = 0; l < 32; ++l) {
      const Fiber& other = *machine.fibers[first + l];
      if (!(f.mask >> l & 1)) continue;
      all = all && other.wait == Wait::warp && other.mask == f.mask && !std::strcmp(other.operation, f.operation);
      parities |= unsigned(other.parity) << l;
    }
    if (!all) continue;
    for (std::size_t l = 0; l < 32; ++l) {
      Fiber& member = *machine.fibers[first + l];
      if (!(f.mask >> l & 1)) continue;
      member.wait = Wait::none;
      member.parities = parities;
      member.parity = !member.parity;
    }
    any = true;
  }
  return any;
}

inline void run_warp(std::size_t first) {
  do
    for (std::size_t l = 0; l < 32; ++l) {
      const std::size_t thread = first + (mode.reversed ? 31 - l : l);
      if (machine.fibers[thread]->wait == Wait::none) resume(thread);
    }
  while (complete_operations(first));
  for (std::size_t thread = first; thread < first + 32; ++thread) {
    const Fiber& f = *machine.fibers[thread];
    threadIdx.x = unsigned(thread);
    if (f.wait == Wait::warp)
      fail(std::string("lanes disagree about ") + f.operation + ": not all of its mask came, or with other masks");
  }
}

inline void run_block() {
  unsigned char* shared = machine.shared.data();
  std::memset(shared, 0xff, machine.shared_bytes);
  for (std::size_t i = machine.shared_bytes; i < machine.shared.size(); ++i) shared[i] = 0xa5;
  for (std::size_t t = 0; t < machine.threads; ++t) prepare(*machine.fibers[t]);
  for (;;) {
    const std::size_t warps = machine.threads / 32;
    for (std::size_t w = 0; w < warps; ++w) run_warp(32 * (mode.reversed ? warps - 1 - w : w));
    const Fiber& first = *machine.fibers[0];
    machine.votes = 0;
    for (std::size_t t = 0; t < machine.threads; ++t) {
      const Fiber& f = *machine.fibers[t];
      threadIdx.x = unsigned(t);
      if (f.wait != first.wait || (f.wait == Wait::block && (f.line != first.line || std::strcmp(f.file, first.file))))
        fail("divergent barrier: some threads of the block are elsewhere, or have ended");
      machine.votes += f.vote;
    }
    if (first.wait == Wait::ended) break;
    for (std::size_t t = 0; t < machine.threads; ++t) machine.fibers[t]->wait = Wait::none;
  }
  for (std::size_t i = machine.shared_bytes; i < machine.shared.size(); ++i)
    if (shared[i] != 0xa5) fail("a write beyond the shared memory of the block");
}

inline void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> body) {
  if (grid.y * grid.z * block.y * block.z != 1) fail("only one-dimensional grids and blocks");
  if (block.x == 0 || block.x % 32 != 0 || block.x > 1024) fail("a block has 32, 64, ... 1024 threads");
  if (shared_bytes > shared_limit) fail("more shared memory than sm_80 has");
  while (machine.fibers.size() < block.x) machine.fibers.emplace_back(new Fiber);
  machine.threads = block.x;
  machine.shared_bytes = shared_bytes;
  machine.shared.resize(shared_bytes + 64);
  machine.body = std::move(body);
  blockDim = block;
  gridDim = grid;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = {mode.reversed ? grid.x - 1 - i : i, 0, 0};
    run_block();
  }
}

// Show `value` to the lanes of `mask` and wait until all have done so.
template <class T>
void exchange(unsigned mask, const T& value, const char* operation, const char* file, int line) {
  static_assert(sizeof(T) <= 32, "a slot is too small");
  Fiber& f = self();
  if (!(mask >> (machine.current % 32) & 1)) fail(std::string(operation) + ": a lane is not in its own mask");
  std::memcpy(f.slot[f.parity], &value, sizeof value);
  f.mask = mask;
  block_on(Wait::warp, operation, file, line);
}

// What a lane showed in the operation that this lane has just left.
template <class T>
T shown_by(unsigned lane) {
  if (!(self().mask >> lane & 1)) fail("a value is read from a lane outside the mask");
  T value;
  const Fiber& other = *machine.fibers[machine.current / 32 * 32 + lane];
  std::memcpy(&value, other.slot[self().parities >> lane & 1], sizeof value);
  return value;
}

}  // namespace vlm::emulation

#define VLM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(VLM_SITE) {
  using namespace vlm::emulation;
  self().vote = false;
  if (!left_out(file, line)) block_on(Wait::block, "__syncthreads", file, line);
}

// Its vote is needed for the control flow, so that it cannot be left out.
inline int __syncthreads_count(bool vote, VLM_SITE) {
  using namespace vlm::emulation;
  self().vote = vote;
  block_on(Wait::block, "__syncthreads_count", file, line);
  return machine.votes;
}

inline void __syncwarp(unsigned mask = ~0u, VLM_SITE) {
  using namespace vlm::emulation;
  if (!left_out(file, line)) exchange(mask, 0, "__syncwarp", file, line);
}

// Fibers change only where they wait.
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, VLM_SITE) {
  vlm::emulation::exchange(mask, value, "__shfl_sync", file, line);
  return vlm::emulation::shown_by<T>(unsigned(from) % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, VLM_SITE) {
  vlm::emulation::exchange(mask, value, "__shfl_xor_sync", file, line);
  return vlm::emulation::shown_by<T>(unsigned(threadIdx.x ^ unsigned(bits)) % 32);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, VLM_SITE) {
  vlm::emulation::exchange(mask, value, "__shfl_up_sync", file, line);
  const unsigned lane = threadIdx.x % 32;
  return lane < by ? value : vlm::emulation::shown_by<T>(lane - by);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, VLM_SITE) {
  vlm::emulation::exchange(mask, vote, "__ballot_sync", file, line);
  unsigned votes = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= unsigned(vlm::emulation::shown_by<bool>(l)) << l;
  return votes;
}

namespace vlm::cuda {

inline int64_t block_room(int /*device*/) { return emulation::shared_limit; }

inline int population(unsigned bits) { return __builtin_popcount(bits); }

// 16 bytes from global to shared memory, of which the first `bytes` are read and the rest are zero.
inline void copy_async_16(void* to, const void* from, int bytes) {
  using namespace vlm::emulation;
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("misaligned asynchronous copy");
  const Copy copy{to, from, bytes, self().group};
  if (!mode.eager) return self().copies.push_back(copy);
  std::memset(to, 0, 16);
  std::memcpy(to, from, bytes);
}

inline void copy_commit() { ++vlm::emulation::self().group; }

// Wait until at most N of the committed groups are on their way.
template <int N>
void copy_wait(VLM_SITE) {
  using namespace vlm::emulation;
  if (left_out(file, line)) return;
  auto& copies = self().copies;
  const int landed = self().group - N;
  for (const Copy& c : copies) {
    if (c.group >= landed) continue;
    std::memset(c.to, 0, 16);
    std::memcpy(c.to, c.from, c.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const Copy& c) { return c.group < landed; }),
               copies.end());
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block, std::size_t shared, void* /*stream*/, Arguments... arguments) {
  emulation::run_grid(grid, block, shared, [=] { kernel(arguments...); });
}

}  // namespace vlm::cuda

#define VLM_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(vlm::emulation::machine.shared.data())
