// Online softmax (FlashAttention-2, section 3.1): a block's statistics and O, and how they begin, grow, merge and end.
//
//   q      Q * scale, with PAIRS Q                         [rows, width of D]
//   out    running sum of exp(s - m) v                     [rows, width of DV]
//   m, l   running maximum of s, sum of exp(s - m)         [rows]
//   e      running sum of exp(s - m) (s - m), for the entropy if it is asked for                  [rows]
#pragma once
#include "scoring.h"
#include "visits.h"
#include "work.h"

struct State {
  float *q, *out, *m, *l, *e;

  State(const Problem& x, Arena& arena, long rows)
      : q(arena.take<float>(rows * width(x.dim))), out(arena.take<float>(rows * width(x.dim_v))), m(arena.take<float>(rows)),
        l(arena.take<float>(rows)), e(arena.take<float>(rows)) {}
  State(const Problem& x, const State& all, long first)     // of a block that begins at a later row
      : q(all.q + first * width(x.dim)), out(all.out + first * width(x.dim_v)), m(all.m + first), l(all.l + first), e(all.e + first) {}
};

// Q of a block as words, without PAIRS multiplied by a factor, and nothing attended to yet.
static void begin(const Problem& x, const Unit& u, const Block& block, const State& w, float factor) {
  const int dim = (int)x.dim, wide = width(dim);
  for (int r = 0; r < block.rows; r++) {
    const void* row = at(x.q, (int)x.q_kind, u.s.of_query(x.q_strides, block.head_of(r), block.query(r)));
    read_words((int)x.q_kind, row, dim, wide, factor, w.q + (long)r * wide);
    w.m[r] = -INFINITY, w.l[r] = 0, w.e[r] = 0;
  }
  memset(w.out, 0, sizeof(float) * block.rows * width(x.dim_v));
}

// e, with its l, as of a maximum from which the old one lies `shift` away, -INFINITY if nothing was attended to.
static inline float rescaled(float e, float l, float shift) { return shift == -INFINITY ? 0 : (e + l * shift) * expf(shift); }

// Takes n panels of scores, in rows `length` apart, times factor, into the statistics of a block's rows and leaves their
// probabilities (algorithm 1, lines 8 to 10).
static void update(const Problem& x, const Unit& u, const Block& block, const State& w, float* scores, long length,
                   const int* visited, int n, float factor) {
  const int wide = width(x.dim_v), columns = columns_of(u.s, visited, n);
  const bool entropy = x.entropy;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float *row = scores + r * length, *out = w.out + (long)r * wide;
    vec top = splat(-INFINITY);
    if (factor != 1) for (int c = 0; c < columns; c += LANES) store(row + c, load(row + c) * factor);
    for (int j = 0; j < n; j++) finish(x, u.s, h, i, visited[j] / 2, visited[j] % 2, row + j * PANEL);
    for (int c = 0; c < columns; c += LANES) top = maximum_or_second(load(row + c), top);
    const float most = largest(top), m = most > w.m[r] ? most : w.m[r], pivot = m == -INFINITY ? 0 : m;
    vec total = {}, weighted = {};
    for (int c = 0; c < columns; c += LANES) {
      const vec log = load(row + c) - pivot, p = exp_of(log);
      total += p;
      if (entropy) weighted += p * maximum_or_second(splat(-200.f), log);  // 0 for -inf
      store(row + c, p);
    }
    if (m != w.m[r] && w.m[r] != -INFINITY) {       // otherwise there is nothing to rescale
      const float alpha = exp_of(splat(w.m[r] - pivot))[0];
      if (entropy) w.e[r] = rescaled(w.e[r], w.l[r], w.m[r] - pivot);
      w.l[r] *= alpha;
      for (int c = 0; c < wide; c += LANES) store(out + c, load(out + c) * alpha);
    }
    w.m[r] = m;
    w.l[r] += sum(total);
    if (entropy) w.e[r] += sum(weighted);
    if (x.dropout)
      for (int j = 0; j < n; j++) {
        alignas(64) uint16_t bits[PANEL];
        random_bits(x, u.s, h, i, visited[j] / 2, bits);
        drop(x, bits, row + j * PANEL);
      }
  }
}

// Divides by the sums, joins the sink, stores (algorithm 1, lines 12 to 14).
static void finalize(const Problem& x, const Unit& u, const Block& block, const State& w) {
  const float rescale = 65536.f / (65536 - x.dropout);
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    const long place = u.s.of_statistics(x, h, i);
    if (x.max_score) ((float*)x.max_score)[place] = w.m[r];
    if (x.entropy) ((float*)x.entropy)[place] = w.l[r] == 0 ? 0 : logf(w.l[r]) - w.e[r] / w.l[r];
    float top = w.m[r], total = w.l[r], weight = 1;
    if (x.sinks) {
      float sink;
      read((int)x.sinks_kind, at(x.sinks, (int)x.sinks_kind, h), 1, 1, &sink);
      const float most = sink > top ? sink : top, pivot = most == -INFINITY ? 0 : most;
      weight = expf(top - pivot);
      total = total * weight + expf(sink - pivot);
      top = most;
    }
    const bool empty = total == 0;
    write((int)x.q_kind, at(x.out, (int)x.q_kind, u.s.of_query(x.out_strides, h, i)), w.out + (long)r * width(x.dim_v), (int)x.dim_v,
          empty ? 0 : weight * rescale / total);
    ((float*)x.lse)[place] = empty ? -INFINITY : top + logf(total);
  }
}

// A part of a block: O [rows, width], then m, then l, then e.
static long part_size(const Problem& x, long rows) { return rows * (width(x.dim_v) + 3); }
static void store_part(const Problem& x, const Block& block, const State& w, float* part) {
  const long wide = width(x.dim_v);
  memcpy(part, w.out, sizeof(float) * block.rows * wide);
  memcpy(part + block.rows * wide, w.m, sizeof(float) * block.rows);
  memcpy(part + block.rows * (wide + 1), w.l, sizeof(float) * block.rows);
  memcpy(part + block.rows * (wide + 2), w.e, sizeof(float) * block.rows);
}

// The parts of one block in order, as one (`tilewise/state.py`).
static void merge(const Problem& x, const Block& block, const float* parts, long part, const State& w) {
  const int wide = width(x.dim_v), rows = block.rows;
  for (int r = 0; r < rows; r++) {
    float *out = w.out + (long)r * wide, m = -INFINITY;
    for (int s = 0; s < x.splits; s++) m = parts[s * part + rows * wide + r] > m ? parts[s * part + rows * wide + r] : m;
    for (int c = 0; c < wide; c++) out[c] = 0;
    w.m[r] = m, w.l[r] = 0, w.e[r] = 0;
    for (int s = 0; s < x.splits; s++) {
      const float *of = parts + s * part, own = of[rows * wide + r], weight = own == -INFINITY && m == own ? 0 : expf(own - m);
      w.l[r] += weight * of[rows * (wide + 1) + r];
      if (x.entropy && weight != 0) w.e[r] += rescaled(of[rows * (wide + 2) + r], of[rows * (wide + 1) + r], own - m);
      for (int c = 0; c < wide; c++) out[c] += weight * of[(long)r * wide + c];
    }
  }
}

// Whether a sequence's few queries read keys where they lie: decode.cpp; otherwise forward.cpp computes it.
static bool has_few(const Problem& x, const Sequence& s) { return s.nq * (x.heads / x.kv_heads) <= x.few_rows; }
