// Jobs of the backward pass, and of its derivative in a direction; always the same bits.
//
// A job is a unit (a key head with its queries), or some of its blocks of keys. For each block of keys, with dK and dV in the L2
// cache, it walks the blocks of queries and adds to dQ, which it has for itself: jobs of one unit add up theirs in order
// afterwards. Where all these dQ together would be large, queries come in several passes, between which dK and dV are kept in
// fp32. Sums over many jobs, as gradients of tables are, are kept for each of a fixed number of lists of jobs.
#pragma once
#include "multiply.h"
#include "pack.h"
#include "threads.h"

// rowsum(dO * out) - dlse of a block's rows, dlse null: 0 (FlashAttention-2, algorithm 2, line 4; lse has a gradient of its own).
// Terms are added as products add those of dP: where one key has all weight, dP - delta is exactly 0. a, b: room for LANES rows.
static void write_delta(const Problem& x, const Unit& u, const Block& block, const void* out, const long* out_strides,
                        const void* dlse, void* delta, float* a, float* b) {
  const int dim = (int)x.dim_v, kind = (int)x.q_kind, wide = width(dim);
  const auto of_out = [&](int r) { return at(out, kind, u.s.of_query(out_strides, block.head_of(r), block.query(r))); };
  const auto of_dout = [&](int r) { return at(x.dout, kind, u.s.of_query(x.dout_strides, block.head_of(r), block.query(r))); };
  for (int first = 0; first < block.rows; first += LANES) {
    const int n = block.rows - first < LANES ? block.rows - first : LANES;
    for (int r = 0; r < n; r++) {
      if (const int later = first + r + AHEAD; later < block.rows) {
        ask_for(of_out(later), dim * size_of(kind));
        ask_for(of_dout(later), dim * size_of(kind));
      }
      read_words(kind, of_out(first + r), dim, wide, 1, a + r * wide);
      read_words(kind, of_dout(first + r), dim, wide, 1, b + r * wide);
    }
    vec total = {};                                 // a row in each lane
    for (int d = 0; d < words(dim); d += LANES) {
      vec of_a[LANES], of_b[LANES];
      for (int i = 0; i < LANES; i++) of_a[i] = load(a + i * wide + d), of_b[i] = load(b + i * wide + d);
      transpose(of_a), transpose(of_b);
      for (int i = 0; i < LANES; i++) total = multiplied(of_b[i], of_a[i], total);
    }
    for (int r = 0; r < n; r++) {
      const long place = u.s.of_statistics(x, block.head_of(first + r), block.query(first + r));
      ((float*)delta)[place] = dlse ? total[r] - ((const float*)dlse)[place] : total[r];
    }
  }
}

// The blocks of queries that one pass visits, and dK and dV of a unit that passes before it have left (null if it is the only
// pass): rows of all keys.
struct Pass {
  long begin, end;
  bool first, last;
  float *dk, *dv;
};

// dK and dV of n panels from `first` on: where a pass adds them up, cleared by the first one. own: a thread's.
static float* sums_of_keys(const Unit& u, const Pass& pass, float* kept, float* own, int first, int n, int wide) {
  float* sums = kept ? kept + (long)first * PANEL * wide : own;
  if (pass.first) memset(sums, 0, sizeof(float) * u.s.keys_of(first, n) * wide);
  return sums;
}

static void store_key_gradients(const Problem& x, const Unit& u, int first, int n, const float* dk, const float* dv) {
  const float rescale = 65536.f / (65536 - x.dropout);
  const int dim = (int)x.dim, dim_v = (int)x.dim_v, kind = (int)x.q_kind;
  for (int j = 0; j < u.s.keys_of(first, n); j++) {
    const int key = first * PANEL + j;
    write(kind, at(x.dk, kind, u.s.of_key(x, x.dk_strides, u.kv_head, key)), dk + (long)j * width(dim), dim, PAIRS ? (float)x.scale : 1);
    write(kind, at(x.dv, kind, u.s.of_key(x, x.dv_strides, u.kv_head, key)), dv + (long)j * width(dim_v), dim_v, rescale);
  }
}

// dq: of this block.
static void store_dq(const Problem& x, const Unit& u, int index, const float* dq) {
  const Block block = block_of(x, u, index);
  for (int r = 0; r < block.rows; r++) {
    const long element = u.s.of_query(x.dq_strides, block.head_of(r), block.query(r));
    write((int)x.q_kind, at(x.dq, (int)x.q_kind, element), dq + r * width(x.dim), (int)x.dim, (float)x.scale);
  }
}

// Where everything lies in the memory that the caller allocated. Scratch: what one thread works with, its dq among it.
template <typename Scratch> struct Memory {
  long dq_size, dk_size, dv_size;                   // of one job, of one unit
  float *dq, *dk, *dv;                              // of jobs where units have several, of units where there are several passes
  Workers<Scratch> workers;

  Memory(const Problem& x, Arena arena)
      : dq_size(x.span * x.block_rows * width(x.dim)), dk_size(panels_of((int)x.nk) * (long)PANEL * width(x.dim)),
        dv_size(panels_of((int)x.nk) * (long)PANEL * width(x.dim_v)),
        dq(arena.take<float>(x.parts > 1 ? x.units_together * x.parts * dq_size : 0)),
        dk(arena.take<float>(several_passes(x) ? x.units_together * dk_size : 0)),
        dv(arena.take<float>(several_passes(x) ? x.units_together * dv_size : 0)), workers(x, arena) {}

  static bool several_passes(const Problem& x) { return x.span < blocks_of(x, (int)x.nq); }
  Pass pass(const Problem& x, const Unit& u, long unit, long begin) const {
    const long blocks = blocks_of(x, u.s.nq), end = begin + x.span;
    const bool several = several_passes(x);
    return {begin, end < blocks ? end : blocks, begin == 0, end >= blocks_of(x, (int)x.nq), several ? dk + unit * dk_size : nullptr,
            several ? dv + unit * dv_size : nullptr};
  }
};

// Blocks of queries from `begin` on, with all keys of so many units: the jobs, then their dQ as one.
template <typename Scratch, typename KeyBlock>
static void one_pass(const Problem& x, const Memory<Scratch>& memory, long first, long units, long begin, KeyBlock key_block) {
  const long jobs = units * x.parts, lists = x.lists && x.lists < jobs ? x.lists : jobs;
  const long each = x.block_rows * width(x.dim);
  in_parallel(x, lists, [&](int worker, Tasks tasks) {
    const Scratch w = memory.workers.of(x, worker);
    for (long list; tasks.take(list);)
      for (long job = list; job < jobs; job += lists) {
        const Unit u = unit_of(x, first + job / x.parts);
        const Pass pass = memory.pass(x, u, job / x.parts, begin);
        const int panels = panels_of(u.s.nk), step = (int)x.panels;
        float* dq = x.parts > 1 ? memory.dq + job * memory.dq_size : w.dq;
        if (pass.begin < pass.end) memset(dq, 0, sizeof(float) * (pass.end - pass.begin) * each);
        for (int p = (int)(job % x.parts) * step; p < panels; p += (int)x.parts * step)
          key_block(x, u, w, pass, (int)list, p, panels - p < step ? panels - p : step, dq);
        for (long index = pass.begin; x.parts == 1 && index < pass.end; index++)
          store_dq(x, u, (int)index, dq + (index - begin) * each);
      }
  });
  if (x.parts > 1)
    in_parallel(x, units * x.span, [&](int, Tasks tasks) {
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, first + task / x.span);
        const long place = task % x.span;
        if (begin + place >= blocks_of(x, u.s.nq)) continue;
        float* total = memory.dq + task / x.span * x.parts * memory.dq_size + place * each;
        for (long part = 1; part < x.parts; part++)
          for (long e = 0; e < each; e += LANES) store(total + e, load(total + e) + load(total + part * memory.dq_size + e));
        store_dq(x, u, (int)(begin + place), total);
      }
    });
}

// All jobs, after what each block of queries prepares (prepare: of a thread's scratch). key_block adds what one block of keys,
// panels first .. first + n - 1, gives to a pass.
template <typename Scratch, typename Prepare, typename KeyBlock>
static void all_jobs(const Problem& x, Prepare prepare, KeyBlock key_block) {
  const Memory<Scratch> memory(x, Arena{(char*)x.scratch});
  const long units = x.batch * x.kv_heads, block_count = blocks_of(x, (int)x.nq);
  in_parallel(x, units * block_count, [&](int worker, Tasks tasks) {
    const Scratch w = memory.workers.of(x, worker);
    for (long task; tasks.take(task);) {
      const Unit u = unit_of(x, task / block_count);
      if (task % block_count < blocks_of(x, u.s.nq)) prepare(x, u, block_of(x, u, (int)(task % block_count)), w);
    }
  });
  for (long first = 0; first < units; first += x.units_together)
    for (long begin = 0; begin == 0 || begin < block_count; begin += x.span)
      one_pass(x, memory, first, units - first < x.units_together ? units - first : x.units_together, begin, key_block);
}
