// The derivative of the backward pass in a direction of q, k, v, bias and sinks (docs/derivatives.md): ten products for each tile,
// by the jobs of the backward (jobs.h). The gradients are their tangents here: dq is dQ', and so on.
#include "direction.h"
#include "jobs.h"
#include "scoring.h"
#include "terms.h"

// What one thread works with.
struct Scratch {
  float *keys, *keys_across, *values_across, *moving_keys, *moving_keys_across, *moving_values_across, *dk, *dv;
  float *q, *q_tangent, *dout, *p, *moved, *ds, *ds_tangent, *lse, *lse_tangent, *delta, *delta_tangent, *rows, *dq;
  float *q_rows, *q_tangent_rows, *dout_rows, *p_rows, *ds_rows, *ds_tangent_rows;   // as in backward.cpp
  int* visits;

  Scratch(const Problem& x, Arena& arena) {
    const long n = x.panels * PANEL, m = x.block_rows, wide = width(x.dim), wide_v = width(x.dim_v);
    const auto take = [&](long size, bool wanted = true) { return wanted ? arena.take<float>(size) : nullptr; };
    const auto along = [&](float* tile, long size) { return PAIRS && tile ? arena.take<float>(words(m) * size) : tile; };
    keys = take(n * words(wide)), keys_across = take(n * words(x.dim)), values_across = take(n * words(x.dim_v));
    moving_keys = take(n * words(wide), x.k_tangent), moving_keys_across = take(n * words(x.dim), x.k_tangent);
    moving_values_across = take(n * words(x.dim_v), x.v_tangent);
    dk = take(n * wide), dv = take(n * wide_v);
    q = take(m * wide), q_tangent = take(m * wide, x.q_tangent), dout = take(m * wide_v);
    p = take(m * n), moved = take(m * n), ds = take(m * n), ds_tangent = take(m * n);
    lse = take(m), lse_tangent = take(m), delta = take(m), delta_tangent = take(m);
    rows = take(PANEL * (wide > wide_v ? wide : wide_v));
    q_rows = along(q, wide), q_tangent_rows = along(q_tangent, wide), dout_rows = along(dout, wide_v);
    p_rows = along(p, n), ds_rows = along(ds, n), ds_tangent_rows = along(ds_tangent, n);
    visits = arena.take<int>(x.panels);
    dq = take(x.parts > 1 ? 0 : x.span * m * wide);
  }
};

// What a block of queries brings; q and its tangent are multiplied by scale without PAIRS.
static void read_block(const Problem& x, const Unit& u, const Block& block, const Scratch& w) {
  const int dim = (int)x.dim, dim_v = (int)x.dim_v, rows = block.rows;
  read_queries(x, u, block, x.q, x.q_strides, dim, (float)x.scale, w.q);
  if (x.q_tangent) read_queries(x, u, block, x.q_tangent, x.q_tangent_strides, dim, (float)x.scale, w.q_tangent);
  read_queries(x, u, block, x.dout, x.dout_strides, dim_v, 1, w.dout);
  read_lse(x, u, block, w.lse);
  read_statistics(x, u, block, x.lse_tangent, w.lse_tangent);
  read_statistics(x, u, block, x.delta, w.delta);
  read_statistics(x, u, block, x.delta_tangent, w.delta_tangent);
  if (!PAIRS) return;
  pair_all_rows(w.q, width(dim), rows, width(dim), w.q_rows, width(dim));
  if (x.q_tangent) pair_all_rows(w.q_tangent, width(dim), rows, width(dim), w.q_tangent_rows, width(dim));
  pair_all_rows(w.dout, width(dim_v), rows, width(dim_v), w.dout_rows, width(dim_v));
}

// From products of n panels to what multiplies dO, Q, K and their tangents:
//
//   p    q.k      to    z p'                    ds            dO.v     to    the gradient of q.k
//   moved         q'.k + q.k'                   ds_tangent    dO.v'    to    its tangent
static void tile_gradients(const Problem& x, const Unit& u, const Block& block, const Scratch& w, int list, const int* visited, int n) {
  const float unit = PAIRS ? (float)x.scale : 1, rescale = 65536.f / (65536 - x.dropout);
  const long length = x.panels * PANEL;
  const int all = columns_of(u.s, visited, n);
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    const float lse = w.lse[r], lse_tangent = w.lse_tangent[r], delta = w.delta[r], delta_tangent = w.delta_tangent[r];
    const long row = r * length;
    Terms terms(x, u.s, h, i, list);
    for (int t = 0; t < n; t++) {
      const int panel = visited[t] / 2, first = panel * PANEL, columns = width(u.s.keys_of(panel));
      const bool partial = visited[t] % 2;
      const long at = row + t * PANEL;
      float *p = w.p + at, *moved = w.moved + at, *ds = w.ds + at, *ds_tangent = w.ds_tangent + at;
      float raw[PANEL], of_bias[PANEL] = {}, of_score[PANEL];
      for (int c = 0; PAIRS && c < columns; c += LANES) store(p + c, load(p + c) * unit);
      if (HAS_SCORE) memcpy(raw, p, sizeof raw);
      finish(x, u.s, h, i, panel, partial, p);
      if (x.bias_tangent) read_bias(x, u.s, x.bias_tangent, x.bias_tangent_strides, h, i, first, of_bias);
      alignas(64) uint16_t bits[PANEL];
      if (x.dropout) random_bits(x, u.s, h, i, panel, bits), drop(x, bits, ds), drop(x, bits, ds_tangent);
      for (int c = 0; c < columns; c += LANES) {
        const ivec k = keys_from(first + c, u.s.nk);
        const vec probability = exp_of(load(p + c) - lse), change = load(moved + c) * unit, dp = load(ds + c) * rescale - delta;
        vec slope = splat(1.f);
        if (HAS_SCORE) slope = score_gradient(x, load(raw + c), u.s.b, h, i, k, u.s.nq, u.s.nk);
        const vec p_tangent = probability * (change * slope + load(of_bias + c) - lse_tangent), d = probability * dp;
        const vec d_tangent = p_tangent * dp + probability * (load(ds_tangent + c) * rescale - delta_tangent);
        vec of_raw = d_tangent * slope;
        if (HAS_CURVATURE) of_raw += score_curvature(x, load(raw + c), u.s.b, h, i, k, u.s.nq, u.s.nk) * change * d;
        const auto seen = [&](vec y) { return partial ? select(probability == 0.f, vec{}, y) : y; };  // 0 also where y is not finite
        store(p + c, seen(p_tangent));
        store(of_score + c, seen(d_tangent));
        store(ds + c, seen(d * slope));
        store(ds_tangent + c, seen(of_raw));
      }
      terms.of_bias(panel, of_score);
      if (x.dropout) drop(x, bits, p);
    }
    terms.finish();
    pair_columns(w.p + row, all);
    pair_columns(w.ds + row, all);
    pair_columns(w.ds_tangent + row, all);
  }
  if (!PAIRS) return;
  pair_all_rows(w.p, length, block.rows, all, w.p_rows, length);
  pair_all_rows(w.ds, length, block.rows, all, w.ds_rows, length);
  pair_all_rows(w.ds_tangent, length, block.rows, all, w.ds_tangent_rows, length);
}

// One block of keys: panels first .. first + n - 1.
static void key_block(const Problem& x, const Unit& u, const Scratch& scratch, const Pass& pass, int list, int first, int n,
                      float* dq) {
  Scratch w = scratch;
  const int dim = (int)x.dim, dim_v = (int)x.dim_v, wide = width(dim), wide_v = width(dim_v), length = (int)x.panels * PANEL;
  const long rows_each = words(PANEL) * wide, each = PANEL * words(dim), each_v = PANEL * words(dim_v);     // panel
  for (int t = 0; t < n; t++) {
    const Panel panel(x, u, first + t);
    panel.pack(x.k, x.k_strides, nullptr, dim, w.rows, w.keys + t * rows_each, w.keys_across + t * each);
    panel.pack(x.v, x.v_strides, nullptr, dim_v, w.rows, nullptr, w.values_across + t * each_v);
    if (x.k_tangent)
      panel.pack(x.k_tangent, x.k_tangent_strides, nullptr, dim, w.rows, w.moving_keys + t * rows_each, w.moving_keys_across + t * each);
    if (x.v_tangent) panel.pack(x.v_tangent, x.v_tangent_strides, nullptr, dim_v, w.rows, nullptr, w.moving_values_across + t * each_v);
  }
  w.dk = sums_of_keys(u, pass, pass.dk, w.dk, first, n, wide);
  w.dv = sums_of_keys(u, pass, pass.dv, w.dv, first, n, wide_v);
  for (int index = (int)pass.begin; index < pass.end; index++) {
    const Block block = block_of(x, u, index);
    const int count = visits(x, u.s, block, first, first + n, w.visits);
    if (!count) continue;
    read_block(x, u, block, w);
    for (int t = 0; t < count; t++) {
      const long own = w.visits[t] / 2 - first, to = t * PANEL;
      const int columns = columns_of(u.s, w.visits + t, 1);
      products(w.q, w.q_tangent, w.keys_across + own * each, x.k_tangent ? w.moving_keys_across + own * each : nullptr, dim, block.rows,
               columns, w.p + to, w.moved + to, length);
      products(w.dout, nullptr, w.values_across + own * each_v, x.v_tangent ? w.moving_values_across + own * each_v : nullptr, dim_v,
               block.rows, columns, w.ds + to, w.ds_tangent + to, length);
    }
    tile_gradients(x, u, block, w, list, w.visits, count);
    for (int t = 0; t < count; t++) {
      const long own = w.visits[t] / 2 - first, from = t * PANEL;
      const int keys = u.s.keys_of(w.visits[t] / 2);
      float *dk = w.dk + own * PANEL * wide, *dv = w.dv + own * PANEL * wide_v;
      multiply<true, true>(w.p_rows + from, length, w.dout_rows, wide_v, dv, wide_v, keys, wide_v, block.rows);
      multiply<true, true>(w.ds_tangent_rows + from, length, w.q_rows, wide, dk, wide, keys, wide, block.rows);
      if (x.q_tangent) multiply<true, true>(w.ds_rows + from, length, w.q_tangent_rows, wide, dk, wide, keys, wide, block.rows);
    }
    float* to = dq + (index - pass.begin) * x.block_rows * wide;
    for (int t = 0, run; t < count; t += run) {     // neighbouring panels as one product
      run = neighbours(w.visits + t, count - t);
      const long own = w.visits[t] / 2 - first, from = words(t * PANEL);
      const int keys = u.s.keys_of(w.visits[t] / 2, run);
      multiply<false, true>(w.ds_tangent + from, length, w.keys + own * rows_each, wide, to, wide, block.rows, wide, keys);
      if (x.k_tangent)
        multiply<false, true>(w.ds + from, length, w.moving_keys + own * rows_each, wide, to, wide, block.rows, wide, keys);
    }
  }
  if (pass.last) store_key_gradients(x, u, first, n, w.dk, w.dv);
}

// Bytes that `backward_tangent` needs at x.scratch.
extern "C" long backward_tangent_memory(const Problem* x) {
  return Memory<Scratch>(*x, Arena{nullptr}).workers.end(*x);
}

extern "C" void backward_tangent(const Problem* problem) {
  const auto prepare = [](const Problem& x, const Unit& u, const Block& block, const Scratch& w) {
    write_delta(x, u, block, x.out, x.out_strides, x.dlse, x.delta, w.rows, w.dout);
    write_delta(x, u, block, x.out_tangent, x.out_tangent_strides, nullptr, x.delta_tangent, w.rows, w.dout);
  };
  all_jobs<Scratch>(*problem, prepare, key_block);
}
