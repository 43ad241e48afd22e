// Forward mode on a CPU: the tangents of out and lse in a direction of q, k, v, bias and sinks (docs/derivatives.md),
//
//   lse' = sum of p s' (+ the sink's share)      out' = sum of z p (s' v + v') - lse' out
//
// by the walk of forward.cpp. As lse is known there is no online softmax: shares of the keys add up.
#include "direction.h"
#include "pack.h"
#include "scoring.h"
#include "threads.h"

// What one thread works with.
struct Scratch {
  float *q, *q_tangent, *p, *weighted, *lse, *sums, *rows;
  int* visits;

  Scratch(const Problem& x, Arena& arena) {
    const long m = x.block_rows, tile = m * x.panels * PANEL, wide = width(x.dim), wide_v = width(x.dim_v);
    q = arena.take<float>(m * wide), q_tangent = x.q_tangent ? arena.take<float>(m * wide) : nullptr;
    p = arena.take<float>(tile), weighted = arena.take<float>(tile), lse = arena.take<float>(m), sums = arena.take<float>(part(x));
    rows = arena.take<float>(PANEL * (wide > wide_v ? wide : wide_v)), visits = arena.take<int>(panels_of((int)x.nk) + 1);
  }
  static long part(const Problem& x) { return x.block_rows * (width(x.dim_v) + 1); }
};

// Of a share of a block's keys: sums of z p (s' v + v') [rows, width of DV], then of p s' [rows].
struct Sums {
  float *out, *lse;
  Sums(const Problem& x, float* at) : out(at), lse(at + x.block_rows * width(x.dim_v)) {}
};

// From products to p and p s' of n panels, both as dropout keeps them: p has q.k, weighted has q'.k + q.k'.
static void tile_tangents(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int n,
                          float* lse_tangent) {
  const long length = x.panels * PANEL;
  const float unit = PAIRS ? (float)x.scale : 1;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    vec total = {};
    for (int t = 0; t < n; t++) {
      const int panel = visited[t] / 2, first = panel * PANEL, columns = width(u.s.keys_of(panel));
      const bool partial = visited[t] % 2;
      float *p = w.p + r * length + t * PANEL, *weighted = w.weighted + r * length + t * PANEL, raw[PANEL], of_bias[PANEL] = {};
      for (int c = 0; PAIRS && c < columns; c += LANES) store(p + c, load(p + c) * unit);
      if (HAS_SCORE) memcpy(raw, p, sizeof raw);
      finish(x, u.s, h, i, panel, partial, p);
      if (x.bias_tangent) read_bias(x, u.s, x.bias_tangent, x.bias_tangent_strides, h, i, first, of_bias);
      for (int c = 0; c < columns; c += LANES) {
        const vec probability = exp_of(load(p + c) - w.lse[r]);
        vec change = load(weighted + c) * unit;
        if (HAS_SCORE) change *= score_gradient(x, load(raw + c), u.s.b, h, i, keys_from(first + c, u.s.nk), u.s.nq, u.s.nk);
        change = probability * (change + load(of_bias + c));
        if (partial) change = select(probability == 0.f, vec{}, change);        // 0 also where its factor is not finite
        total += change;
        store(p + c, probability);
        store(weighted + c, change);
      }
      if (!x.dropout) continue;
      alignas(64) uint16_t bits[PANEL];
      random_bits(x, u.s, h, i, panel, bits);
      drop(x, bits, p);
      drop(x, bits, weighted);
    }
    lse_tangent[r] += sum(total);
    pair_columns(w.p + r * length, columns_of(u.s, visited, n));
    pair_columns(w.weighted + r * length, columns_of(u.s, visited, n));
  }
}

// The sums of a block over some of the panels it visits. moving: of the tangents of keys and values.
static void attend(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int count,
                   const Packed& packed, const Packed& moving, const Sums& sums) {
  const int dim = (int)x.dim, wide_v = width(x.dim_v), length = (int)x.panels * PANEL;
  read_queries(x, u, block, x.q, x.q_strides, dim, (float)x.scale, w.q);
  if (x.q_tangent) read_queries(x, u, block, x.q_tangent, x.q_tangent_strides, dim, (float)x.scale, w.q_tangent);
  read_lse(x, u, block, w.lse);
  memset(sums.out, 0, sizeof(float) * block.rows * wide_v);
  memset(sums.lse, 0, sizeof(float) * block.rows);
  for (int done = 0, n; done < count; done += n, visited += n) {
    n = group_of(x, visited, count - done);
    for (int j = 0; j < n; j++)
      products(w.q, w.q_tangent, packed.key(visited[j] / 2), x.k_tangent ? moving.key(visited[j] / 2) : nullptr, dim, block.rows,
               columns_of(u.s, visited + j, 1), w.p + j * PANEL, w.weighted + j * PANEL, length);
    tile_tangents(x, u, block, w, visited, n, sums.lse);
    for (int j = 0, run; j < n; j += run) {
      run = x.aligned ? 1 : neighbours(visited + j, n - j);
      const long from = words(j * PANEL), first = visited[j] / 2;
      const int keys = u.s.keys_of((int)first, run);
      multiply<false, true>(w.weighted + from, length, packed.value(first), wide_v, sums.out, wide_v, block.rows, wide_v, keys);
      if (x.v_tangent)
        multiply<false, true>(w.p + from, length, moving.value(first), wide_v, sums.out, wide_v, block.rows, wide_v, keys);
    }
  }
}

// Joins the sink, subtracts lse' out, stores.
static void finalize(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const Sums& sums) {
  const float rescale = 65536.f / (65536 - x.dropout);
  const int dim = (int)x.dim_v, kind = (int)x.q_kind;
  read_lse(x, u, block, w.lse);
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float lse_tangent = sums.lse[r], *row = sums.out + (long)r * width(dim), *out = w.rows;
    if (x.sinks_tangent) {
      float sink, change;
      read((int)x.sinks_kind, at(x.sinks, (int)x.sinks_kind, h), 1, 1, &sink);
      read((int)x.sinks_kind, at(x.sinks_tangent, (int)x.sinks_kind, h), 1, 1, &change);
      lse_tangent += expf(sink - w.lse[r]) * change;
    }
    read(kind, at(x.out, kind, u.s.of_query(x.out_strides, h, i)), 1, dim, out);
    for (int d = 0; d < dim; d++) row[d] = row[d] * rescale - lse_tangent * out[d];
    write(kind, at(x.out_tangent, kind, u.s.of_query(x.out_tangent_strides, h, i)), row, dim, 1);
    ((float*)x.lse_tangent)[u.s.of_statistics(x, h, i)] = lse_tangent;
  }
}

// Where everything lies in the memory that the caller allocated.
struct Memory {
  long unit_size, part;
  float *packed, *moving, *parts;
  Workers<Scratch> workers;

  Memory(const Problem& x, Arena arena)
      : unit_size(Packed::size(x, panels_of((int)x.nk))), part(Scratch::part(x)),
        packed(arena.take<float>(x.units_together * unit_size)),
        moving(arena.take<float>(x.k_tangent || x.v_tangent ? x.units_together * unit_size : 0)),
        parts(arena.take<float>(x.splits > 1 ? x.units_together * blocks_of(x, (int)x.nq) * x.splits * part : 0)),
        workers(x, arena) {}
};

// Bytes that `tangent` needs at x.scratch.
extern "C" long tangent_memory(const Problem* x) {
  return Memory(*x, Arena{nullptr}).workers.end(*x);
}

// So many units at a time as packed keys and values stay in the last cache.
extern "C" void tangent(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, Arena{(char*)x.scratch});
  const long units = x.batch * x.kv_heads, together = x.units_together, block_count = blocks_of(x, (int)x.nq);
  const long panels = panels_of((int)x.nk);
  const int dim = (int)x.dim, dim_v = (int)x.dim_v;
  const auto packed = [&](float* all, long slot) { return Packed(x, all + slot * memory.unit_size, panels); };
  for (long first = 0; first < units; first += together) {
    const long here = units - first < together ? units - first : together;
    in_parallel(x, here * panels, [&](int worker, Tasks tasks) {
      const Scratch w = memory.workers.of(x, worker);
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, first + task / panels);
        const Packed to = packed(memory.packed, task / panels), moving = packed(memory.moving, task / panels);
        const long p = task % panels;
        if (p >= panels_of(u.s.nk)) continue;
        const Panel panel(x, u, (int)p);
        panel.pack(x.k, x.k_strides, nullptr, dim, w.rows, nullptr, to.key(p));
        panel.pack(x.v, x.v_strides, nullptr, dim_v, w.rows, to.value(p), nullptr);
        if (x.k_tangent) panel.pack(x.k_tangent, x.k_tangent_strides, nullptr, dim, w.rows, nullptr, moving.key(p));
        if (x.v_tangent) panel.pack(x.v_tangent, x.v_tangent_strides, nullptr, dim_v, w.rows, moving.value(p), nullptr);
      }
    });
    in_parallel(x, here * block_count * x.splits, [&](int worker, Tasks tasks) {
      const Scratch w = memory.workers.of(x, worker);
      for (long task; tasks.take(task);) {
        const long share = task % x.splits, of_block = task / x.splits, slot = of_block / block_count;
        const long index = block_count - 1 - of_block % block_count;   // under a causal mask the longest first
        const Unit u = unit_of(x, first + slot);
        if (index >= blocks_of(x, u.s.nq)) continue;
        const Block block = block_of(x, u, (int)index);
        const long count = visits(x, u.s, block, 0, panels_of(u.s.nk), w.visits);
        const long from = count * share / x.splits, to = count * (share + 1) / x.splits;
        float* own = memory.parts + ((slot * block_count + index) * x.splits + share) * memory.part;
        const Sums sums(x, x.splits > 1 ? own : w.sums);
        attend(x, u, block, w, w.visits + from, (int)(to - from), packed(memory.packed, slot), packed(memory.moving, slot), sums);
        if (x.splits == 1) finalize(x, u, block, w, sums);
      }
    });
    if (x.splits > 1)
      in_parallel(x, here * block_count, [&](int worker, Tasks tasks) {
        const Scratch w = memory.workers.of(x, worker);
        for (long task; tasks.take(task);) {
          const Unit u = unit_of(x, first + task / block_count);
          if (task % block_count >= blocks_of(x, u.s.nq)) continue;
          const Block block = block_of(x, u, (int)(task % block_count));
          const Sums sums(x, memory.parts + task * x.splits * memory.part);
          for (long share = 1; share < x.splits; share++) {
            const Sums more(x, sums.out + share * memory.part);
            for (long e = 0; e < block.rows * width(dim_v); e++) sums.out[e] += more.out[e];
            for (int r = 0; r < block.rows; r++) sums.lse[r] += more.lse[r];
          }
          finalize(x, u, block, w, sums);
        }
      });
  }
}
