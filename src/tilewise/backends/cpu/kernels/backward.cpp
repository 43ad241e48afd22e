// FlashAttention-2, backward (Dao 2023, algorithm 2), on a CPU: five products for each tile (jobs.h).
#include "jobs.h"
#include "multiply.h"
#include "scoring.h"
#include "terms.h"

// What one thread works with.
struct Scratch {
  float *keys, *keys_across, *values_across, *dk, *dv, *q, *dout, *p, *ds, *lse, *delta, *rows, *dq;
  float *q_rows, *dout_rows, *p_rows, *ds_rows;     // as words along the rows; without PAIRS the same
  int* visits;

  Scratch(const Problem& x, Arena& arena) {
    const long n = x.panels * PANEL, m = x.block_rows, wide = width(x.dim), wide_v = width(x.dim_v);
    keys = arena.take<float>(n * words(wide)), keys_across = arena.take<float>(n * words(x.dim));
    values_across = arena.take<float>(n * words(x.dim_v));
    dk = arena.take<float>(n * wide), dv = arena.take<float>(n * wide_v);
    q = arena.take<float>(m * wide), dout = arena.take<float>(m * wide_v);
    p = arena.take<float>(m * n), ds = arena.take<float>(m * n);
    lse = arena.take<float>(m), delta = arena.take<float>(m);
    rows = arena.take<float>(PANEL * (wide > wide_v ? wide : wide_v));
    q_rows = PAIRS ? arena.take<float>(words(m) * wide) : q;
    dout_rows = PAIRS ? arena.take<float>(words(m) * wide_v) : dout;
    p_rows = PAIRS ? arena.take<float>(words(m) * n) : p;
    ds_rows = PAIRS ? arena.take<float>(words(m) * n) : ds;
    visits = arena.take<int>(x.panels);
    dq = arena.take<float>(x.parts > 1 ? 0 : x.span * m * wide);
  }
};

// Q, multiplied by scale without PAIRS, dO, lse and delta of a block.
static void read_block(const Problem& x, const Unit& u, const Block& block, const Scratch& w) {
  const int dim = (int)x.dim, dim_v = (int)x.dim_v;
  read_queries(x, u, block, x.q, x.q_strides, dim, (float)x.scale, w.q);
  read_queries(x, u, block, x.dout, x.dout_strides, dim_v, 1, w.dout);
  read_lse(x, u, block, w.lse);
  read_statistics(x, u, block, x.delta, w.delta);
  if (!PAIRS) return;
  pair_all_rows(w.q, width(dim), block.rows, width(dim), w.q_rows, width(dim));
  pair_all_rows(w.dout, width(dim_v), block.rows, width(dim_v), w.dout_rows, width(dim_v));
}

// From products to P and dS of n panels: p has q.k and becomes what multiplies dO, ds has dO.v and becomes the gradient of q.k.
static void tile_gradients(const Problem& x, const Unit& u, const Block& block, const Scratch& w, int list, const int* visited, int n) {
  const float rescale = 65536.f / (65536 - x.dropout);
  const long length = x.panels * PANEL;
  const int all = columns_of(u.s, visited, n);
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    const float lse = w.lse[r], delta = w.delta[r];
    Terms terms(x, u.s, h, i, list);
    for (int t = 0; t < n; t++) {
      const int panel = visited[t] / 2, columns = width(u.s.keys_of(panel));
      const bool partial = visited[t] % 2;
      float *p = w.p + (r * x.panels + t) * PANEL, *ds = w.ds + (r * x.panels + t) * PANEL, raw[PANEL], of_score[PANEL];
      const bool finished = !HAS_SCORE && !x.bias && !partial;
      const float unit = PAIRS ? (float)x.scale : 1, left = finished ? unit : 1;   // of factors, what scores still lack
      for (int c = 0; unit != left && c < columns; c += LANES) store(p + c, load(p + c) * unit);
      if (HAS_SCORE) memcpy(raw, p, sizeof raw);
      finish(x, u.s, h, i, panel, partial, p);
      alignas(64) uint16_t bits[PANEL];
      if (x.dropout) random_bits(x, u.s, h, i, panel, bits);
      if (x.dropout) drop(x, bits, ds);
      for (int c = 0; c < columns; c += LANES) {
        const vec probability = exp_of(load(p + c) * left - lse), dp = x.dropout ? load(ds + c) * rescale : load(ds + c);
        vec d = probability * (dp - delta);
        if (partial) d = select(probability == 0.f, vec{}, d);         // 0 also where dp is not finite
        store(p + c, probability);
        if (!HAS_SCORE) {
          store(ds + c, d);
          continue;
        }
        const vec gradient = score_gradient(x, load(raw + c), u.s.b, h, i, keys_from(panel * PANEL + c, u.s.nk), u.s.nq, u.s.nk);
        store(of_score + c, d);
        store(ds + c, partial ? select(probability == 0.f, vec{}, d * gradient) : d * gradient);
      }
      terms.of_bias(panel, HAS_SCORE ? of_score : ds);
      terms.of_tables(panel, partial, raw, HAS_SCORE ? of_score : ds, p);
      if (x.dropout) drop(x, bits, p);
    }
    terms.finish();
    pair_columns(w.p + r * length, all);
    pair_columns(w.ds + r * length, all);
  }
  if (!PAIRS) return;
  pair_all_rows(w.p, length, block.rows, all, w.p_rows, length);
  pair_all_rows(w.ds, length, block.rows, all, w.ds_rows, length);
}

// One block of keys: panels first .. first + n - 1.
static void key_block(const Problem& x, const Unit& u, const Scratch& scratch, const Pass& pass, int list, int first, int n,
                      float* dq) {
  Scratch w = scratch;
  const int dim = (int)x.dim, dim_v = (int)x.dim_v, wide = width(dim), wide_v = width(dim_v), length = (int)x.panels * PANEL;
  for (int t = 0; t < n; t++) {
    const Panel panel(x, u, first + t);
    panel.pack(x.k, x.k_strides, nullptr, dim, w.rows, w.keys + t * words(PANEL) * wide, w.keys_across + t * PANEL * words(dim));
    panel.pack(x.v, x.v_strides, nullptr, dim_v, w.rows, nullptr, w.values_across + t * PANEL * words(dim_v));
  }
  w.dk = sums_of_keys(u, pass, pass.dk, w.dk, first, n, wide);
  w.dv = sums_of_keys(u, pass, pass.dv, w.dv, first, n, wide_v);
  for (int index = (int)pass.begin; index < pass.end; index++) {
    const Block block = block_of(x, u, index);
    const int count = visits(x, u.s, block, first, first + n, w.visits);
    if (!count) continue;
    read_block(x, u, block, w);
    for (int t = 0; t < count; t++) {
      const int own = w.visits[t] / 2 - first, columns = columns_of(u.s, w.visits + t, 1);
      multiply<false, false>(w.q, wide, w.keys_across + own * PANEL * words(dim), PANEL, w.p + t * PANEL, length, block.rows, columns,
                             dim);
      multiply<false, false>(w.dout, wide_v, w.values_across + own * PANEL * words(dim_v), PANEL, w.ds + t * PANEL, length, block.rows,
                             columns, dim_v);
    }
    tile_gradients(x, u, block, w, list, w.visits, count);
    for (int t = 0; t < count; t++) {
      const int keys = u.s.keys_of(w.visits[t] / 2);
      const long own = w.visits[t] / 2 - first;
      multiply<true, true>(w.p_rows + t * PANEL, length, w.dout_rows, wide_v, w.dv + own * PANEL * wide_v, wide_v, keys, wide_v, block.rows);
      multiply<true, true>(w.ds_rows + t * PANEL, length, w.q_rows, wide, w.dk + own * PANEL * wide, wide, keys, wide, block.rows);
    }
    for (int t = 0, run; t < count; t += run) {     // neighbouring panels as one product
      run = neighbours(w.visits + t, count - t);
      const long own = w.visits[t] / 2 - first;
      multiply<false, true>(w.ds + words(t * PANEL), length, w.keys + own * words(PANEL) * wide, wide,
                            dq + (index - pass.begin) * x.block_rows * wide, wide, block.rows, wide,
                            u.s.keys_of(w.visits[t] / 2, run));
    }
  }
  if (pass.last) store_key_gradients(x, u, first, n, w.dk, w.dv);
}

// Bytes that `backward` needs at x.scratch.
extern "C" long backward_memory(const Problem* x) {
  return Memory<Scratch>(*x, Arena{nullptr}).workers.end(*x);
}

extern "C" void backward(const Problem* problem) {
  const auto prepare = [](const Problem& x, const Unit& u, const Block& block, const Scratch& w) {
    write_delta(x, u, block, x.out, x.out_strides, x.dlse, x.delta, w.rows, w.dout);
  };
  all_jobs<Scratch>(*problem, prepare, key_block);
}
