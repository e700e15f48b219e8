// The tensor core attention kernel against a float64 oracle on the same bf16 numbers.
#include <stdexcept>

#include "../attention_oracle.hpp"
#include "emulated.hpp"
#include "vlm/cuda.hpp"

using namespace vlm;
using namespace vlm::test;

namespace {

struct Case {
  int64_t batch, query_heads, key_heads, queries, keys, width, value_width;
  bool causal;
  int64_t offset;
  bool mask, bias;
  bool window = false;  // of 40 keys back and 3 ahead
  std::string name() const {
    return "B" + std::to_string(batch) + " H" + std::to_string(query_heads) + "/" + std::to_string(key_heads) + " N" +
           std::to_string(queries) + " M" + std::to_string(keys) + " D" + std::to_string(width) + " V" +
           std::to_string(value_width) + " causal" + std::to_string(causal) + " mask" + std::to_string(mask) + " bias" +
           std::to_string(bias);
  }
};

int64_t stride_of(int64_t width) { return (width + 7) / 8 * 8 + 8; }

struct Tensors {
  Case c;
  std::vector<uint16_t> q, k, v, out, dout, dq, dk, dv;
  std::vector<uint8_t> mask;
  std::vector<float> bias, lse, dlse;
  AttentionAnswer exact;
  MaskAtom window{AtomKind::local_band, {0, 40, 3, 0}, nullptr, 0, 0, 0, nullptr, 0, 0};

  explicit Tensors(const Case& c_) : c(c_) {
    Numbers numbers(5);
    const auto fill = [&](int64_t count) {
      std::vector<uint16_t> values;
      for (float x : numbers.normal(count)) values.push_back(uint16_t(cuda::pack_bf16(x, 0.0f)));
      return values;
    };
    q = fill(c.batch * c.query_heads * c.queries * stride_of(c.width));
    k = fill(c.batch * c.key_heads * c.keys * stride_of(c.width));
    v = fill(c.batch * c.key_heads * c.keys * stride_of(c.value_width));
    dout = fill(c.batch * c.query_heads * c.queries * stride_of(c.value_width));
    dlse = numbers.normal(c.batch * c.query_heads * c.queries);
    if (c.mask) mask.resize(c.batch * c.keys);
    for (int64_t j = 0; j < int64_t(mask.size()); ++j) {
      mask[j] = numbers.below(4) > 0 && j >= (c.batch > 1 ? c.keys : 0);  // the first of several sequences has no key
      const int64_t b = j / c.keys;
      for (int64_t g = 0; g < c.key_heads && !mask[j]; ++g) {
        const int64_t row = (b * c.key_heads + g) * c.keys + j % c.keys;
        std::fill_n(k.begin() + row * stride_of(c.width), c.width, uint16_t(0x7fff));  // NaN
        std::fill_n(v.begin() + row * stride_of(c.value_width), c.value_width, uint16_t(0x7fff));
      }
    }
    if (c.bias) bias = numbers.normal(c.query_heads * c.queries * c.keys);
    window.n[0] = c.offset;
    solve();
  }

  void solve() {  // on the same numbers in float32
    const std::vector<float> fq = wide(q), fk = wide(k), fv = wide(v), fdout = wide(dout);
    const auto view = [](const std::vector<float>& t, int64_t heads, int64_t length, int64_t stride) {
      return Heads{t.data(), heads * length * stride, length * stride, stride};
    };
    AttentionBackward call{};
    call.problem = problem();
    call.problem.q = view(fq, c.query_heads, c.queries, stride_of(c.width));
    call.problem.k = view(fk, c.key_heads, c.keys, stride_of(c.width));
    call.problem.v = view(fv, c.key_heads, c.keys, stride_of(c.value_width));
    call.dout = view(fdout, c.query_heads, c.queries, stride_of(c.value_width));
    call.dlse = dlse.data();
    exact = attention_oracle(call);
  }
  float scale() const { return 1.0f / std::sqrt(float(c.width)); }

  AttentionProblem problem() const {  // without q, k and v
    Heads b{nullptr, 0, 0, 0};
    if (c.bias) b = {bias.data(), 0, c.queries * c.keys, c.keys};
    const Heads none{nullptr, 0, 0, 0};
    return {c.batch, c.query_heads, c.key_heads, c.queries, c.keys, c.width, c.value_width, none, none, none, scale(),
            c.causal, c.offset, c.mask ? mask.data() : nullptr, c.keys, b, &window, c.window ? 1 : 0};
  }
  static Heads halves(const std::vector<uint16_t>& t, int64_t heads, int64_t length, int64_t stride) {
    return {reinterpret_cast<const float*>(t.data()), heads * length * stride, length * stride, stride};
  }
  static MutableHeads halves_to(std::vector<uint16_t>& t, int64_t heads, int64_t length, int64_t width) {
    return {reinterpret_cast<float*>(t.data()), heads * length * width, length * width, width};
  }

  void run() {
    AttentionProblem half = problem();
    half.half = true;
    half.q = halves(q, c.query_heads, c.queries, stride_of(c.width));
    half.k = halves(k, c.key_heads, c.keys, stride_of(c.width));
    half.v = halves(v, c.key_heads, c.keys, stride_of(c.value_width));
    out.assign(exact.out.size(), 0x7fff);
    lse.assign(exact.lse.size(), NAN);
    std::vector<uint8_t> covers(cuda::attention_forward_workspace(half), 77);
    cuda::attention_forward({half, halves_to(out, c.query_heads, c.queries, c.value_width), lse.data()}, covers.data(),
                            nullptr);
    dq.assign(exact.dq.size(), 0x7fff);
    dk.assign(exact.dk.size(), 0x7fff);
    dv.assign(exact.dv.size(), 0x7fff);
    std::vector<float> workspace(cuda::attention_backward_workspace(half) / 4 + 1, NAN);
    cuda::attention_backward({half, halves(out, c.query_heads, c.queries, c.value_width), lse.data(),
                              halves(dout, c.query_heads, c.queries, stride_of(c.value_width)), dlse.data(),
                              halves_to(dq, c.query_heads, c.queries, c.width),
                              halves_to(dk, c.key_heads, c.keys, c.width),
                              halves_to(dv, c.key_heads, c.keys, c.value_width), nullptr, 1, 1, 1},
                             workspace.data(), nullptr);
  }
  static std::vector<float> wide(const std::vector<uint16_t>& t) {
    std::vector<float> values;
    for (uint16_t bits : t) values.push_back(cuda::float_of_bf16(bits));
    return values;
  }
  bool close() const {
    return error_between(wide(out), exact.out) <= 6e-3 && error_between(lse, exact.lse) <= 3e-6 &&
           error_between(wide(dq), exact.dq) <= 1e-2 && error_between(wide(dk), exact.dk) <= 1e-2 &&
           error_between(wide(dv), exact.dv) <= 1e-2;
  }
};

void compare(const Case& c) {
  Tensors t(c), first(c);
  first.run();
  in_every_mode([&](const std::string& mode) {
    t.run();
    const std::string name = c.name() + " " + mode;
    // Rounding to 8 bits: of the result, of each probability, and of its gradient.
    check_close(Tensors::wide(t.out), t.exact.out, 6e-3, name + " out");
    check_close(t.lse, t.exact.lse, 3e-6, name + " lse");
    check_close(Tensors::wide(t.dq), t.exact.dq, 1e-2, name + " dq");
    check_close(Tensors::wide(t.dk), t.exact.dk, 1e-2, name + " dk");
    check_close(Tensors::wide(t.dv), t.exact.dv, 1e-2, name + " dv");
    check(t.out == first.out && t.dq == first.dq && t.dk == first.dk && t.dv == first.dv,
          name + ": bits depend on the order of execution");
  });
}

}  // namespace

int main() {
  return run_emulated([] {
    compare({1, 1, 1, 1, 1, 8, 8, false, 0, false, false});
    compare({1, 1, 1, 0, 4, 8, 8, false, 0, false, false});
    compare({1, 1, 1, 4, 0, 8, 8, false, 0, false, false});
    compare({1, 2, 1, 63, 65, 64, 64, true, 2, true, false});
    compare({2, 2, 1, 65, 64, 33, 21, true, -1, true, true});
    compare({1, 1, 1, 20, 130, 128, 72, false, 0, false, true});
    compare({1, 2, 1, 130, 150, 16, 24, false, 20, true, false, true});
    const Tensors small(Case{1, 1, 1, 200, 200, 16, 16, true, 0, true, false, true});
    every_barrier_is_needed("attention bf16", [&] {
      Tensors t = small;
      t.run();
      return t.close();
    });
    bool refused = false;
    try {
      Tensors t(Case{1, 1, 1, 4, 4, 8, 136, false, 0, false, false});
      t.run();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "a width over 128 is refused");
  });
}
