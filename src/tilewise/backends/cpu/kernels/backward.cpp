// FlashAttention-2, backward (Dao 2023, algorithm 2), on a CPU: five products for each tile, and always the same bits.
//
// A job is a unit (a key head with its queries), or some of its blocks of keys. For each block of keys, with dK and dV in the L2
// cache, it walks the blocks of queries and adds to dQ, which it has for itself: jobs of one unit add up theirs in order
// afterwards. Where all these dQ together would be large, queries come in several passes, between which dK and dV are kept in
// fp32. Sums over many jobs, as gradients of tables are, are kept for each of a fixed number of lists of jobs.
#include "multiply.h"
#include "scoring.h"
#include "terms.h"
#include "threads.h"
#include "visits.h"
#include "work.h"

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

// delta = rowsum(dO * O) - dlse (algorithm 2, line 4; lse has a gradient of its own).
static void preprocess(const Problem& x, const Unit& u, const Block& block, float* out, float* dout) {
  const int dim = (int)x.dim_v, kind = (int)x.q_kind;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    if (const int later = r + AHEAD; later < block.rows) {
      ask_for(at(x.out, kind, u.s.of_query(x.out_strides, block.head_of(later), block.query(later))), dim * size_of(kind));
      ask_for(at(x.dout, kind, u.s.of_query(x.dout_strides, block.head_of(later), block.query(later))), dim * size_of(kind));
    }
    read(kind, at(x.out, kind, u.s.of_query(x.out_strides, h, i)), 1, dim, out);
    read(kind, at(x.dout, kind, u.s.of_query(x.dout_strides, h, i)), 1, dim, dout);
    float total = 0;
    for (int d = 0; d < dim; d++) total += out[d] * dout[d];
    const long place = u.s.of_statistics(x, h, i);
    ((float*)x.delta)[place] = x.dlse ? total - ((const float*)x.dlse)[place] : total;
  }
}

// Q, multiplied by scale without PAIRS, and dO of a block; 0 where a query sees no key, since padding may hold NaN.
static void read_block(const Problem& x, const Unit& u, const Block& block, const Scratch& w) {
  const int kind = (int)x.q_kind, dim = (int)x.dim, dim_v = (int)x.dim_v;
  const auto q = [&](int r) { return at(x.q, kind, u.s.of_query(x.q_strides, block.head_of(r), block.query(r))); };
  const auto dout = [&](int r) { return at(x.dout, kind, u.s.of_query(x.dout_strides, block.head_of(r), block.query(r))); };
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float *own = w.q + (long)r * width(dim), *own_dout = w.dout + (long)r * width(dim_v);
    if (r + AHEAD < block.rows) ask_for(q(r + AHEAD), dim * size_of(kind)), ask_for(dout(r + AHEAD), dim_v * size_of(kind));
    if (BANDS && hidden_query(x, u.s, h, i)) {
      memset(own, 0, sizeof(float) * width(dim));
      memset(own_dout, 0, sizeof(float) * width(dim_v));
    } else {
      read_words(kind, q(r), dim, width(dim), PAIRS ? 1 : (float)x.scale, own);
      read_words(kind, dout(r), dim_v, width(dim_v), 1, own_dout);
    }
    const long place = u.s.of_statistics(x, h, i);
    const float lse = ((const float*)x.lse)[place];
    w.lse[r] = lse == -INFINITY ? INFINITY : lse;
    w.delta[r] = ((const float*)x.delta)[place];
  }
  if (!PAIRS) return;
  pair_all_rows(w.q, width(dim), block.rows, width(dim), w.q_rows, width(dim));
  pair_all_rows(w.dout, width(dim_v), block.rows, width(dim_v), w.dout_rows, width(dim_v));
}

// From products to P and dS of n panels: p has q.k and becomes what multiplies dO, ds has dO.v and becomes the gradient of q.k.
static void tile_gradients(const Problem& x, const Unit& u, const Block& block, const Scratch& w, int list, const int* visited, int n) {
  const float rescale = 65536.f / (65536 - x.dropout);
  const long length = x.panels * PANEL;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    const float lse = w.lse[r], delta = w.delta[r];
    Terms terms(x, u.s, h, i, list);
    for (int t = 0; t < n; t++) {
      const int panel = visited[t] / 2;
      const bool partial = visited[t] % 2;
      float *p = w.p + (r * x.panels + t) * PANEL, *ds = w.ds + (r * x.panels + t) * PANEL, raw[PANEL], of_score[PANEL];
      const bool finished = !HAS_SCORE && !x.bias && !partial;
      const float unit = PAIRS ? (float)x.scale : 1, left = finished ? unit : 1;   // of factors, what scores still lack
      for (int c = 0; unit != left && c < PANEL; c += LANES) store(p + c, load(p + c) * unit);
      if (HAS_SCORE) memcpy(raw, p, sizeof raw);
      finish(x, u.s, h, i, panel, partial, p);
      alignas(64) uint16_t bits[PANEL];
      if (x.dropout) random_bits(x, u.s, h, i, panel, bits);
      if (x.dropout) drop(x, bits, ds);
      for (int c = 0; c < PANEL; c += LANES) {
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
      terms.take(panel, partial, raw, HAS_SCORE ? of_score : ds, p);
      if (x.dropout) drop(x, bits, p);
    }
    terms.finish();
    pair_columns(w.p + r * length, n * PANEL);
    pair_columns(w.ds + r * length, n * PANEL);
  }
  if (!PAIRS) return;
  pair_all_rows(w.p, length, block.rows, n * PANEL, w.p_rows, length);
  pair_all_rows(w.ds, length, block.rows, n * PANEL, w.ds_rows, length);
}

// The blocks of queries that one pass visits, and dK and dV of a unit that passes before it have left (null if it is the only
// pass): rows of all keys.
struct Pass {
  long begin, end;
  bool first, last;
  float *dk, *dv;
};

// One block of keys: panels first .. first + n - 1.
static void key_block(const Problem& x, const Unit& u, const Scratch& scratch, const Pass& pass, int list, int first, int n,
                      float* dq) {
  Scratch w = scratch;
  const int dim = (int)x.dim, dim_v = (int)x.dim_v, wide = width(dim), wide_v = width(dim_v), length = (int)x.panels * PANEL;
  for (int t = 0; t < n; t++) {
    bool hidden[PANEL];
    const int key = (first + t) * PANEL;
    if (BANDS) hidden_keys(x, u.s, u.kv_head, key, hidden);
    const bool* of_hidden = BANDS ? hidden - key : nullptr;
    float *keys = w.keys + t * words(PANEL) * wide, *rows = PAIRS ? w.rows : keys;
    read_keys(x, u.s, x.k, nullptr, x.k_strides, u.kv_head, key, PANEL, dim, wide, of_hidden, rows);
    if (PAIRS) pair_all_rows(rows, wide, PANEL, wide, keys, wide);
    transposed(rows, words(dim), wide, w.keys_across + t * PANEL * words(dim));
    read_keys(x, u.s, x.v, nullptr, x.v_strides, u.kv_head, key, PANEL, dim_v, wide_v, of_hidden, w.rows);
    transposed(w.rows, words(dim_v), wide_v, w.values_across + t * PANEL * words(dim_v));
  }
  if (pass.dk) w.dk = pass.dk + (long)first * PANEL * wide, w.dv = pass.dv + (long)first * PANEL * wide_v;
  if (pass.first) {
    memset(w.dk, 0, sizeof(float) * n * PANEL * wide);
    memset(w.dv, 0, sizeof(float) * n * PANEL * wide_v);
  }
  for (int index = (int)pass.begin; index < pass.end; index++) {
    const Block block = block_of(x, u, index);
    const int count = visits(x, u.s, block, first, first + n, w.visits);
    if (!count) continue;
    read_block(x, u, block, w);
    for (int t = 0; t < count; t++) {
      const int own = w.visits[t] / 2 - first;
      multiply<false, false>(w.q, wide, w.keys_across + own * PANEL * words(dim), PANEL, w.p + t * PANEL, length, block.rows, PANEL, dim);
      multiply<false, false>(w.dout, wide_v, w.values_across + own * PANEL * words(dim_v), PANEL, w.ds + t * PANEL, length, block.rows,
                             PANEL, dim_v);
    }
    tile_gradients(x, u, block, w, list, w.visits, count);
    for (int t = 0; t < count; t++) {
      const long own = w.visits[t] / 2 - first;
      multiply<true, true>(w.p_rows + t * PANEL, length, w.dout_rows, wide_v, w.dv + own * PANEL * wide_v, wide_v, PANEL, wide_v, block.rows);
      multiply<true, true>(w.ds_rows + t * PANEL, length, w.q_rows, wide, w.dk + own * PANEL * wide, wide, PANEL, wide, block.rows);
    }
    for (int t = 0, run; t < count; t += run) {     // neighbouring panels as one product
      for (run = 1; t + run < count && w.visits[t + run] / 2 == w.visits[t] / 2 + run;) run++;
      const long own = w.visits[t] / 2 - first;
      multiply<false, true>(w.ds + words(t * PANEL), length, w.keys + own * words(PANEL) * wide, wide,
                            dq + (index - pass.begin) * x.block_rows * wide, wide, block.rows, wide, run * PANEL);
    }
  }
  if (!pass.last) return;
  const float rescale = 65536.f / (65536 - x.dropout);
  for (int j = 0; j < n * PANEL && first * PANEL + j < u.s.nk; j++) {
    const int key = first * PANEL + j, kind = (int)x.q_kind;
    write(kind, at(x.dk, kind, u.s.of_key(x, x.dk_strides, u.kv_head, key)), w.dk + (long)j * wide, dim, PAIRS ? (float)x.scale : 1);
    write(kind, at(x.dv, kind, u.s.of_key(x, x.dv_strides, u.kv_head, key)), w.dv + (long)j * wide_v, dim_v, rescale);
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

// Where everything lies in the memory that the caller allocated.
struct Memory {
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

// Bytes that `backward` needs at x.scratch.
extern "C" long backward_memory(const Problem* x) {
  return Memory(*x, Arena{nullptr}).workers.end(*x);
}

// Blocks of queries from `begin` on, with all keys of so many units: the jobs, then their dQ as one.
static void one_pass(const Problem& x, const Memory& memory, long first, long units, long begin) {
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

extern "C" void backward(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, Arena{(char*)x.scratch});
  const long units = x.batch * x.kv_heads, block_count = blocks_of(x, (int)x.nq);
  in_parallel(x, units * block_count, [&](int worker, Tasks tasks) {
    const Scratch w = memory.workers.of(x, worker);
    for (long task; tasks.take(task);) {
      const Unit u = unit_of(x, task / block_count);
      if (task % block_count < blocks_of(x, u.s.nq)) preprocess(x, u, block_of(x, u, (int)(task % block_count)), w.rows, w.dout);
    }
  });
  for (long first = 0; first < units; first += x.units_together)
    for (long begin = 0; begin == 0 || begin < block_count; begin += x.span)
      one_pass(x, memory, first, units - first < x.units_together ? units - first : x.units_together, begin);
}
