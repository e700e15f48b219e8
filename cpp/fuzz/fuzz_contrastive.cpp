// Contrastive losses of drawn shapes, strides, targets, exclusions, teachers and element types, against the float64
// oracle; one to four threads bit for bit; calls that do not fit are refused.
#include "contrastive_oracle.hpp"
#include "input.hpp"
#include "vlm/contrastive.hpp"

using namespace vlm;
using namespace vlm::fuzz;

namespace {

// Rows of embeddings; memory ends with the last element, gaps are NaN.
struct Rows {
  int64_t stride;
  std::vector<float> data;
  std::vector<uint16_t> half;
  Rows(Bytes& in, Draw& draw, int64_t rows, int64_t width) : stride(width + in.below(5)) {
    data.assign(rows > 0 ? (rows - 1) * stride + width : 0, NAN);
    const float scale = 1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(width, 1)));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t e = 0; e < width; ++e) data[i * stride + e] = draw.number() * scale;
  }
  // bfloat16 rows, and in float32 what they hold.
  void halve() {
    for (float& x : data) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      bits &= 0xffff0000u;
      std::memcpy(&x, &bits, 4);
      half.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
  Matrix view() const { return {half.empty() ? data.data() : reinterpret_cast<const float*>(half.data()), stride}; }
};

std::vector<int64_t> ids(Draw& draw, int64_t count, int64_t names) {
  static const int64_t far[] = {INT64_MIN, INT64_MAX, -1, int64_t(1) << 40, 0, -2};
  std::vector<int64_t> values(count);
  for (int64_t& id : values) {
    const int64_t n = draw.below(names);
    id = n < 6 ? far[n] : n;
  }
  return values;
}

struct Results {
  std::vector<float> rows, columns, dx, dy;
  double dlog_scale = 0.0, dbias = 0.0;
  bool same(const Results& o) const {
    return same_bits(rows, o.rows) && same_bits(columns, o.columns) && same_bits(dx, o.dx) && same_bits(dy, o.dy) &&
           std::memcmp(&dlog_scale, &o.dlog_scale, 8) == 0 && std::memcmp(&dbias, &o.dbias, 8) == 0;
  }
};

void spoil(Bytes& in, PairProblem& p) {
  static const int64_t id[1] = {0};
  static const float label[1] = {0.0f};
  switch (in.below(5)) {
    case 0: {
      int64_t* sizes[] = {&p.rows, &p.columns, &p.width, &p.teacher.width};
      *in.among(sizes) = in.one_in(2) ? INT64_MIN : -1 - in.below(100);
      return;
    }
    case 1: p.row_ids = p.row_ids == nullptr ? id : nullptr, p.column_ids = p.row_ids == nullptr ? id : nullptr; return;
    case 2:
      p.row_excluded = in.one_in(2) ? id : nullptr, p.column_excluded = p.row_excluded == nullptr ? id : nullptr;
      return;
    case 3:
      p.positive_label = in.one_in(2) ? label : nullptr,
      p.negative_label = p.positive_label == nullptr ? label : nullptr;
      return;
    default: (in.one_in(2) ? p.rows : p.columns) = int64_t(INT32_MAX) + 1 + in.below(3);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.level();
  const int threads = in.threads();
  Draw draw(in.word());
  const bool wrong = in.one_in(12);
  const PairLoss loss = in.one_in(2) ? PairLoss::sigmoid : PairLoss::softmax;
  PairProblem p{};
  p.rows = in.size(in.one_in(6) ? 300 : 70);
  p.columns = in.size(in.one_in(6) ? 600 : 70);
  p.width = in.size(40);
  Rows x(in, draw, p.rows, p.width), y(in, draw, p.columns, p.width);
  p.half = in.one_in(4);
  if (p.half) x.halve(), y.halve();
  p.scale = 0.1f * static_cast<float>(in.below(120));
  p.bias = loss == PairLoss::sigmoid ? 0.1f * static_cast<float>(in.between(-100, 40)) : 0.0f;
  std::vector<int64_t> row_ids, column_ids, row_excluded, column_excluded;
  std::vector<float> positive_label, negative_label;
  static const int64_t none = 0;
  if (in.one_in(2)) {
    const int64_t names = 1 + in.below(40);
    row_ids = ids(draw, p.rows, names), column_ids = ids(draw, p.columns, names);
    p.row_ids = row_ids.empty() ? &none : row_ids.data(), p.column_ids = column_ids.empty() ? &none : column_ids.data();
  } else {
    const int64_t offsets[] = {0, 1, -1, 40, -40, INT64_MAX, INT64_MIN};
    p.row_offset = in.among(offsets);
  }
  if (in.one_in(3)) {
    const int64_t names = 1 + in.below(40);
    row_excluded = ids(draw, p.rows, names), column_excluded = ids(draw, p.columns, names);
    p.row_excluded = row_excluded.empty() ? &none : row_excluded.data();
    p.column_excluded = column_excluded.empty() ? &none : column_excluded.data();
  }
  p.decoupled = loss == PairLoss::softmax && in.one_in(4);
  p.full = loss == PairLoss::softmax && in.one_in(4);
  p.negative_weight = loss == PairLoss::sigmoid && in.one_in(3) ? 0.1f * static_cast<float>(in.below(30)) : 1.0f;
  if (loss == PairLoss::sigmoid && p.rows > 0 && in.one_in(3)) {
    for (int64_t i = 0; i < p.rows; ++i) {
      positive_label.push_back(1.0f - 0.01f * static_cast<float>(draw.below(30)));
      negative_label.push_back(0.01f * static_cast<float>(draw.below(30)));
    }
    p.positive_label = positive_label.data(), p.negative_label = negative_label.data();
  }
  p.teacher.similar = INFINITY;
  p.teacher.width = in.size(30);
  Rows teacher_x(in, draw, p.rows, p.teacher.width), teacher_y(in, draw, p.columns, p.teacher.width);
  if (in.one_in(3) && !teacher_x.data.empty() && !teacher_y.data.empty()) {
    p.teacher.x = teacher_x.view(), p.teacher.y = teacher_y.view();
    p.teacher.scale = 0.1f * static_cast<float>(in.below(80));
    p.teacher.bias = 0.1f * static_cast<float>(in.between(-20, 20));
    p.teacher.share = 0.01f * static_cast<float>(in.below(101));
    if (in.one_in(2)) p.teacher.similar = 0.1f * static_cast<float>(in.between(-20, 40)) + 0.037f;
  }
  about = words("loss", int(loss), "R", p.rows, "C", p.columns, "E", p.width, "half", p.half, "scale", p.scale, "bias",
                p.bias, "ids", p.row_ids != nullptr, "offset", p.row_offset, "excluded", p.row_excluded != nullptr,
                "decoupled", p.decoupled, "full", p.full, "weight", p.negative_weight, "labels",
                p.positive_label != nullptr, "teacher", p.teacher.x.data != nullptr, "width", p.teacher.width,
                "similar", p.teacher.similar, "share", p.teacher.share);
  p.x = x.view(), p.y = y.view();
  if (wrong) {
    spoil(in, p);
    require_refused([&] { pair_forward(loss, {p, nullptr, nullptr}, threads); }, "pair loss: a forward call");
    require_refused(
        [&] { pair_backward(loss, {p, nullptr, nullptr, nullptr, nullptr, {}, {}, nullptr, nullptr}, threads); },
        "pair loss: a backward call");
    return 0;
  }
  PairProblem wide = p;
  wide.x = {x.data.data(), x.stride}, wide.y = {y.data.data(), y.stride};
  test::PairOracle o(loss, wide);
  const int64_t gradients = loss == PairLoss::sigmoid ? 1 : PAIR_GRADIENTS;
  std::vector<float> up_rows = draw.numbers(gradients * p.rows), up_columns = draw.numbers(gradients * p.columns);
  // What does not exist has no gradient: lse of no pair, and the numbers nobody asked for.
  const auto settle = [&](std::vector<float>& up, const std::vector<double>& of, int64_t n) {
    for (int64_t a = 0; loss == PairLoss::softmax && a < n; ++a) {
      if (std::isinf(of[a])) up[a] = 0.0f;
      if (!o.totals) up[2 * n + a] = 0.0f;
      if (p.teacher.x.data == nullptr || std::isinf(of[6 * n + a])) up[3 * n + a] = 0.0f;
    }
  };
  settle(up_rows, o.rows, p.rows), settle(up_columns, o.columns, p.columns);
  const bool with_columns = !in.one_in(4), with_dx = !in.one_in(5), with_dy = !in.one_in(5);
  o.backward(loss, up_rows.data(), with_columns ? up_columns.data() : nullptr);
  const int64_t x_gap = in.below(4), y_gap = in.below(4);
  const auto run = [&](int n) {
    Results r;
    r.rows.assign(o.rows.size(), untouched), r.columns.assign(o.columns.size(), untouched);
    pair_forward(loss, {p, r.rows.data(), with_columns ? r.columns.data() : nullptr}, n);
    std::vector<float> statistics = r.columns;
    if (!with_columns) {
      for (float c : r.columns) require(c == untouched, "pair loss: columns that nobody wanted were written");
      statistics.assign(o.columns.begin(), o.columns.end());
    }
    Bytes plain(nullptr, 0);
    const auto room = [&](int64_t rows, int64_t gap) {
      Field f(plain, 1, 1, rows, p.width);
      f.row_stride = p.width + gap;
      f.data.assign(rows > 0 ? (rows - 1) * f.row_stride + p.width : 0, untouched);
      return f;
    };
    Field dx = room(p.rows, x_gap), dy = room(p.columns, y_gap);
    pair_backward(loss,
                  {p,
                   r.rows.data(),
                   statistics.data(),
                   up_rows.data(),
                   with_columns ? up_columns.data() : nullptr,
                   {with_dx ? dx.data.data() : nullptr, dx.row_stride},
                   {with_dy ? dy.data.data() : nullptr, dy.row_stride},
                   &r.dlog_scale,
                   loss == PairLoss::sigmoid ? &r.dbias : nullptr},
                  n);
    r.dx = dx.written("dx"), r.dy = dy.written("dy");
    return r;
  };
  const Results r = run(1);
  require(r.same(run(threads)), "pair loss: bits differ with threads");
  if (o.borderline) return 0;
  require_close(r.rows, o.rows, 2e-5, "pair rows");
  if (with_columns) require_close(r.columns, o.columns, 2e-5, "pair columns");
  const auto check_gradient = [&](const std::vector<float>& got, const std::vector<double>& expected,
                                  const std::vector<double>& terms, const char* what) {
    if (!p.half || !multiplies_bfloat16()) return require_close(got, expected, 1e-4, what);
    // By contract the gradients of the logits are rounded to bfloat16 there: each term of a sum by 2^-9 of its size.
    for (std::size_t n = 0; n < expected.size(); ++n)
      require(std::fabs(got[n] - expected[n]) <= 0x1p-8 * terms[n] + 1e-5, what);
  };
  if (with_dx) check_gradient(r.dx, o.dx, o.dx_terms, "pair dx");
  if (with_dy) check_gradient(r.dy, o.dy, o.dy_terms, "pair dy");
  require(std::fabs(r.dlog_scale - o.dlog_scale) <= 1e-4 * (1.0 + o.size), "pair dlog_scale");
  if (loss == PairLoss::sigmoid) require(std::fabs(r.dbias - o.dbias) <= 1e-4 * (1.0 + o.size), "pair dbias");
  return 0;
}
