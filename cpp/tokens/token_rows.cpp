// Rows moved and summed: weighted gather, and sums of the members of every slot. Compiled once per level.
#include "core/parallel_for.hpp"
#include "tokens/token_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

// Rows of one piece of work: about 16 thousand numbers.
VLM_INLINE int64_t grain_of(int64_t width) { return larger(1, 16384 / larger(width, 1)); }
VLM_INLINE int useful(int64_t rows, int64_t width, int threads) { return rows * width < 100000 ? 1 : threads; }

// A few kilobytes: memcpy's own start costs more here than its tricks gain.
VLM_INLINE void copied(const char* from, int64_t bytes, char* to) {
  constexpr int64_t step = W * sizeof(float);
  int64_t at = 0;
  for (; at + 4 * step <= bytes; at += 4 * step) {
    vf block[4];
    __builtin_memcpy(block, from + at, sizeof(block));
    __builtin_memcpy(to + at, block, sizeof(block));
  }
  for (; at + step <= bytes; at += step) {
    vf block;
    __builtin_memcpy(&block, from + at, sizeof(block));
    __builtin_memcpy(to + at, &block, sizeof(block));
  }
  for (; at < bytes; ++at) to[at] = from[at];
}
VLM_INLINE void scaled(const float* from, float weight, int64_t width, float* to) {
  int64_t e = 0;
  for (; e + W <= width; e += W) store(to + e, load(from + e) * weight);
  for (; e < width; ++e) to[e] = from[e] * weight;
}
VLM_INLINE void add_scaled(const float* from, float weight, int64_t width, float* to) {
  int64_t e = 0;
  for (; e + W <= width; e += W) store(to + e, load(to + e) + load(from + e) * weight);
  for (; e < width; ++e) to[e] += from[e] * weight;
}

}  // namespace

void token_gather(const TokenGather& c, int threads) {
  const int64_t bytes = c.width * c.element_bytes;
  if (bytes == 0) return;  // then there may be no memory at all, which memset does not take
  parallel_for(c.batch * c.length, grain_of(c.width), useful(c.batch * c.length, c.width, threads),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t at = begin; at < end; ++at) {
                   char* to = static_cast<char*>(c.to) + at * bytes;
                   const int64_t index = c.index[at];
                   const int64_t row = at / c.length * c.batch_stride + index * c.row_stride;
                   const float weight = c.weights == nullptr ? 1.0f : c.weights[at];
                   if (index < 0 || weight == 0.0f)
                     __builtin_memset(to, 0, static_cast<std::size_t>(bytes));
                   else if (weight == 1.0f)
                     copied(static_cast<const char*>(c.from) + row * c.element_bytes, bytes, to);
                   else
                     scaled(static_cast<const float*>(c.from) + row, weight, c.width, reinterpret_cast<float*>(to));
                 }
               });
}

void token_scatter(const TokenScatter& c, const int64_t* starts, const int64_t* members, int threads) {
  if (c.width == 0) return;
  parallel_for(c.batch * c.length, grain_of(c.width), useful(c.batch * c.length, c.width, threads),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t at = begin; at < end; ++at) {
                   float* to = c.to + at * c.width;
                   bool first = true;
                   for (int64_t m = starts[at]; m < starts[at + 1]; ++m) {  // members count rows of the whole batch
                     const int64_t n = members[m];
                     const float weight = c.weights == nullptr ? 1.0f : c.weights[n];
                     if (weight == 0.0f) continue;
                     const float* from = c.from + n / c.from_length * c.batch_stride + n % c.from_length * c.row_stride;
                     if (first)
                       scaled(from, weight, c.width, to);
                     else
                       add_scaled(from, weight, c.width, to);
                     first = false;
                   }
                   if (first) __builtin_memset(to, 0, static_cast<std::size_t>(c.width) * sizeof(float));
                 }
               });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
