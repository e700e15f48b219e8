// Linear attention with decay, in chunks or position by position. Compiled once per level.
//
// A task is (batch, head, slice of the value columns): columns of the state never meet, so that slices are independent.
// With few heads the columns are cut, else a task takes all of them.
#include "core/parallel_for.hpp"
#include "core/tile_gemm.hpp"
#include "recurrent/recurrent_kernels.hpp"

namespace vlm {
namespace VLM_LEVEL {
namespace {

constexpr int64_t WANTED_TASKS = 8;

struct Plan {
  const LinearScan& p;
  int64_t chunks, slices, slice;  // slice: value columns of a task, a multiple of NR unless there is one slice
  int64_t out_stride, panels;     // panels: of NR value columns
  explicit Plan(const LinearScan& call) : p(call), chunks((call.length + call.chunk - 1) / call.chunk) {
    const int64_t heads = larger(1, p.batch * p.heads), most = larger(1, p.value_width / (2 * W));
    const int64_t cuts = smaller(most, larger(1, WANTED_TASKS / heads));
    slice = cuts == 1 ? larger(1, p.value_width) : round_up((p.value_width + cuts - 1) / cuts, NR);
    slices = larger(1, (p.value_width + slice - 1) / slice);
    out_stride = round_up(slice, NR);
    panels = out_stride / NR;
  }
};

// What one worker owns. All of a head's chunk lies here in the forms that the tile product wants.
struct Worker {
  float* powers;          // [chunk + 1]: a^n
  float* fading;          // [chunk + MR + NR]: a^(chunk - 1 - i), then zeros
  float *enter, *leave;   // [chunk]: factors of the state on a row, of a row on the state
  int32_t* order;         // [chunk]: number among the rows that exist, -1 if it does not
  uint8_t* there;         // [chunk]
  int32_t* runs;          // [chunk]
  float *query, *keys, *columns, *values, *state, *added, *out, *scores;

  static int64_t room(const Plan& s, Worker* w, float* at) {
    const int64_t c = s.p.chunk, d = s.p.width;
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* place = at == nullptr ? nullptr : at + used;
      used += round_up(larger(floats, 1), NR);
      return place;
    };
    w->powers = take(c + 1);
    w->fading = take(c + MR + 2 * NR);
    w->enter = take(c);
    w->leave = take(c);
    w->order = reinterpret_cast<int32_t*>(take(c));
    w->runs = reinterpret_cast<int32_t*>(take(c));
    w->there = reinterpret_cast<uint8_t*>(take(c / 4 + 1));
    w->query = take(packed_rows_room(c, d) + NR);
    w->keys = take(panels_room(c, d) + NR);
    w->columns = take(round_up(d, MR) * c);
    w->values = take(s.out_stride * c);
    w->state = take(s.out_stride * d);
    w->added = take(NR * d);
    w->out = take(MR * s.out_stride);
    w->scores = take(MR * LDS);
    return used;
  }
};

// a^n for n = 0 .. count - 1; no denormal numbers, which are slow.
void fill_powers(float* to, int64_t count, double log_decay) {
  for (int64_t n = 0; n < count; ++n) {
    const float value = static_cast<float>(n == 0 ? 1.0 : __builtin_exp(n * log_decay));
    to[n] = value < 1.2e-38f ? 0.0f : value;
  }
}

// One head in the order in which it is visited: row t of a chunk that starts at `first` lies at first + t.
struct Sequence {
  const float *q, *k, *v;
  float* out;
  int64_t q_step, k_step, v_step, out_step;
  const uint8_t* keep;
  const int32_t* run;
  int64_t step;  // of keep and run: 1 or -1
};

Sequence sequence_of(const LinearScan& p, int64_t b, int64_t h, int64_t e0) {
  const int64_t start = p.reverse && p.length > 0 ? p.length - 1 : 0, sign = p.reverse ? -1 : 1;
  const auto at = [&](const Heads& x) {
    return x.data + b * x.batch_stride + h * x.head_stride + start * x.row_stride;
  };
  return {at(p.q),
          at(p.k),
          at(p.v) + e0,
          p.out.data + b * p.out.batch_stride + h * p.out.head_stride + start * p.out.row_stride + e0,
          sign * p.q.row_stride,
          sign * p.k.row_stride,
          sign * p.v.row_stride,
          sign * p.out.row_stride,
          p.keep == nullptr ? nullptr : p.keep + b * p.length + start,
          p.run == nullptr ? nullptr : p.run + b * p.length + start,
          sign};
}

// Groups of MR columns, [group][rows][MR]: the left operand of X^T Y. Row r is scaled by factor[r].
void pack_columns(const float* source, int64_t stride, int64_t rows, int64_t columns, const float* factor,
                  const uint8_t* keep, float* to) {
  for (int64_t c = 0; c < columns; c += MR) {
    const int64_t count = smaller(MR, columns - c);
    for (int64_t r = 0; r < rows; ++r, to += MR) {
      const bool there = (keep == nullptr || keep[r] != 0) && factor[r] != 0.0f;
      const float* from = source + r * stride + c;
      for (int64_t i = 0; i < count; ++i) to[i] = there ? from[i] * factor[r] : 0.0f;
      for (int64_t i = count; i < MR; ++i) to[i] = 0.0f;
    }
  }
}

void pack_kept_rows(const float* source, int64_t stride, int64_t rows, int64_t columns, const uint8_t* keep,
                    float* to) {
  for (int64_t r = 0; r < rows; r += MR, to += MR * columns)
    interleave<MR>(source + r * stride, stride, smaller(MR, rows - r), columns, 1.0f,
                   keep == nullptr ? nullptr : keep + r, to);
}

// What rows and state mean to each other in one chunk; returns the factor of the state over the whole of it.
float weigh_chunk(const Plan& s, Worker& w, const Sequence& q, int64_t first, int64_t rows, bool last) {
  const int64_t early = s.p.reverse ? 0 : 1;  // the state decays before it is read, or after
  if (q.keep == nullptr && q.run == nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      w.enter[r] = w.powers[r + early];
      w.leave[r] = w.powers[rows - r - early];
    }
    return w.powers[rows];
  }
  int32_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    w.there[r] = q.keep == nullptr || q.keep[(first + r) * q.step] != 0;
    w.runs[r] = q.run == nullptr ? 0 : q.run[(first + r) * q.step];
    w.order[r] = w.there[r] ? count++ : -1;
  }
  const int32_t comes = w.runs[0];
  const int32_t goes = last || q.run == nullptr ? w.runs[rows - 1] : q.run[(first + rows) * q.step];
  for (int64_t r = 0; r < rows; ++r) {
    w.enter[r] = w.there[r] && w.runs[r] == comes ? w.powers[w.order[r] + early] : 0.0f;
    w.leave[r] = w.there[r] && w.runs[r] == goes ? w.powers[count - w.order[r] - early] : 0.0f;
  }
  return comes == goes ? w.powers[count] : 0.0f;
}

// Scores of one row times the decay between it and each key; keys that it does not see become 0.
void fade_scores(const Plan& s, const Worker& w, float* scores, int64_t r, int64_t seen, bool plain) {
  const int64_t padded = round_up(seen, W);
  if (plain) {
    const float* fading = w.fading + s.p.chunk - 1 - r;
    for (int64_t c = 0; c < padded; c += W) store(scores + c, load(scores + c) * load(fading + c));
    for (int64_t c = r + 1; c < seen; ++c) scores[c] = 0.0f;
    return;
  }
  for (int64_t c = 0; c < seen; ++c) {
    const bool sees = c <= r && w.there[r] && w.there[c] && w.runs[r] == w.runs[c];
    scores[c] = sees ? scores[c] * w.powers[w.order[r] - w.order[c]] : 0.0f;
  }
}

void scale_state(float* state, int64_t count, float factor) {
  if (factor == 0.0f) {
    for (int64_t i = 0; i < count; i += W) store(state + i, vf{});
    return;
  }
  for (int64_t i = 0; i < count; i += W) store(state + i, load(state + i) * factor);
}

void run_chunk(const Plan& s, Worker& w, const Sequence& q, int64_t first, int64_t rows, bool last, int64_t columns) {
  const int64_t d = s.p.width, c = s.p.chunk;
  const bool plain = q.keep == nullptr && q.run == nullptr;
  const float carry = weigh_chunk(s, w, q, first, rows, last);
  const uint8_t* keep = plain ? nullptr : w.there;
  pack_kept_rows(q.q + first * q.q_step, q.q_step, rows, d, keep, w.query);
  pack_transposed(q.k + first * q.k_step, q.k_step, rows, d, keep, w.keys);
  pack_columns(q.k + first * q.k_step, q.k_step, rows, d, w.leave, keep, w.columns);
  pack_plain(q.v + first * q.v_step, q.v_step, rows, columns, keep, w.values, NR * c);
  for (int64_t g = 0; g < rows; g += MR) {
    const int64_t height = smaller(MR, rows - g), seen = g + height;
    multiply<PackedRows>(height, columns, d, w.query + g * d, 0, w.state, NR * d, w.out, s.out_stride, false);
    multiply<PackedRows>(height, seen, d, w.query + g * d, 0, w.keys, NR * d, w.scores, LDS, false);
    for (int64_t r = 0; r < height; ++r) {
      scale_state(w.out + r * s.out_stride, round_up(columns, W), w.enter[g + r]);
      fade_scores(s, w, w.scores + r * LDS, g + r, seen, plain);
    }
    multiply<TileRows>(height, columns, seen, w.scores, 0, w.values, NR * c, w.out, s.out_stride, true);
    for (int64_t r = 0; r < height; ++r) {
      float* out = q.out + (first + g + r) * q.out_step;
      const bool there = keep == nullptr || keep[g + r] != 0;
      for (int64_t e = 0; e < columns; e += W)
        store_first(out + e, there ? load(w.out + r * s.out_stride + e) : vf{}, columns - e);
    }
  }
  // What the chunk adds is summed by itself: one rounding against the larger state, not one for each row.
  for (int64_t e = 0, panel = 0; e < columns; e += NR, ++panel) {
    float* state = w.state + panel * NR * d;
    multiply<PackedRows>(d, NR, rows, w.columns, MR * rows, w.values + panel * NR * c, 0, w.added, NR, false);
    for (int64_t i = 0; i < NR * d; i += W)
      store(state + i, carry == 0.0f ? load(w.added + i) : load(state + i) * carry + load(w.added + i));
  }
}

// The recurrence itself, for the rows [first, first + rows).
void run_steps(const Plan& s, Worker& w, const Sequence& q, int64_t first, int64_t rows, int64_t columns) {
  const int64_t d = s.p.width;
  const float decay = w.powers[1];
  for (int64_t t = first; t < first + rows; ++t) {
    float* out = q.out + t * q.out_step;
    const float *query = q.q + t * q.q_step, *key = q.k + t * q.k_step, *value = q.v + t * q.v_step;
    const bool there = q.keep == nullptr || q.keep[t * q.step] != 0;
    for (int64_t e = 0, panel = 0; e < columns; e += NR, ++panel)
      for (int64_t part = 0; part < NR && e + part < columns; part += W) {
        const int64_t count = columns - e - part;
        vf sum{};
        if (there) {
          const vf v = load_first(value + e + part, count);
          float* state = w.state + panel * NR * d + part;
          for (int64_t i = 0; i < d; ++i, state += NR) {
            vf next = load(state);
            next = s.p.reverse ? next + key[i] * v : next * decay + key[i] * v;
            sum += query[i] * next;
            store(state, s.p.reverse ? next * decay : next);
          }
        }
        store_first(out + e + part, sum, count);
      }
    const bool ends = q.run != nullptr && t + 1 < s.p.length && q.run[t * q.step] != q.run[(t + 1) * q.step];
    if (ends) scale_state(w.state, s.panels * NR * d, 0.0f);
  }
}

void read_state(const Plan& s, const Worker& w, const float* from, int64_t columns) {
  if (from == nullptr)
    scale_state(w.state, s.panels * NR * s.p.width, 0.0f);
  else
    pack_plain(from, s.p.value_width, s.p.width, columns, nullptr, w.state, NR * s.p.width);
}
void write_state(const Plan& s, const Worker& w, float* to, int64_t columns) {
  for (int64_t e = 0, panel = 0; e < columns; e += NR, ++panel)
    for (int64_t i = 0; i < s.p.width; ++i)
      for (int64_t part = 0; part < NR && e + part < columns; part += W)
        store_first(to + i * s.p.value_width + e + part, load(w.state + (panel * s.p.width + i) * NR + part),
                    columns - e - part);
}

void run_head(const Plan& s, Worker& w, int64_t b, int64_t h, int64_t e0) {
  const LinearScan& p = s.p;
  const int64_t columns = smaller(s.slice, p.value_width - e0), c = p.chunk, cell = p.width * p.value_width;
  const int64_t spans = p.boundaries == nullptr || s.chunks == 0 ? 0 : (s.chunks - 1) / p.boundary_every + 1;
  fill_powers(w.powers, c + 1, p.log_decay[h]);
  for (int64_t i = 0; i < c; ++i) w.fading[i] = w.powers[c - 1 - i];
  for (int64_t i = c; i < c + MR + 2 * NR; ++i) w.fading[i] = 0.0f;
  const Sequence sequence = sequence_of(p, b, h, e0);
  read_state(s, w, p.state == nullptr ? nullptr : p.state + (b * p.heads + h) * cell + e0, columns);
  for (int64_t visit = 0; visit < s.chunks; ++visit) {
    const int64_t number = p.reverse ? s.chunks - 1 - visit : visit, start = number * c;
    const int64_t rows = smaller(c, p.length - start), first = p.reverse ? p.length - start - rows : start;
    const bool marked = spans > 0 && number % p.boundary_every == 0;
    float* mark = marked ? p.boundaries + ((b * p.heads + h) * spans + number / p.boundary_every) * cell + e0 : nullptr;
    if (marked && !p.reverse) write_state(s, w, mark, columns);
    if (c == 1)
      run_steps(s, w, sequence, first, rows, columns);
    else
      run_chunk(s, w, sequence, first, rows, visit == s.chunks - 1, columns);
    if (marked && p.reverse) write_state(s, w, mark, columns);
  }
  if (p.final_state != nullptr) write_state(s, w, p.final_state + (b * p.heads + h) * cell + e0, columns);
}

}  // namespace

void linear_scan(const LinearScan& call, int threads) {
  const Plan plan(call);
  const LinearScan& p = plan.p;
  if (p.value_width == 0) return;
  if (static_cast<double>(p.batch) * p.heads * p.length * p.width * p.value_width < 1e6) threads = 1;
  const int64_t tasks = p.batch * p.heads * plan.slices;
  Worker sizes;
  const int64_t room = Worker::room(plan, &sizes, nullptr);
  Scratch memory(threads * room);
  parallel_for(tasks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    Worker w;
    Worker::room(plan, &w, memory.data + worker * room);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / plan.slices;
      run_head(plan, w, head / p.heads, head % p.heads, task % plan.slices * plan.slice);
    }
  });
}

}  // namespace VLM_LEVEL
}  // namespace vlm
