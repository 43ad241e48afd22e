// FlashAttention-2, forward (Dao 2023, algorithm 1), on a CPU, and Flash-Decoding.
//
// A thread takes a block of queries of one key head and keeps Q, a tile of scores and O in its L2 cache; scores never reach
// memory. Keys come as panels [D, 64], ready for the products' vectors, values as rows, packed once for all blocks of a head
// (`pack_panel`). A sequence with few queries, as in decoding, reads keys and values where they lie, all heads of a panel in turn
// (`attend_few`). Keys may be cut into shares, each a task of its own, merged in order afterwards.
//
// Panels are walked in groups that begin at multiples of `x.panels`, so that a row's sums do not depend on the rows beside it.
#include "few.h"
#include "multiply.h"
#include "scoring.h"
#include "threads.h"
#include "visits.h"
#include "work.h"

// Where panel p of a unit's keys [D, PANEL] and values [PANEL, width of DV] begins among packed ones.
struct Packed {
  float *k, *v;
  long k_panel, v_panel;
  float* key(long p) const { return k + p * k_panel; }
  float* value(long p) const { return v + p * v_panel; }
};

static Packed packed_of(const Problem& x, float* at, long panels) {
  const long k_panel = x.dim * PANEL, v_panel = (long)PANEL * width(x.dim_v);
  return {at, at + panels * k_panel, k_panel, v_panel};
}

static void pack_panel(const Problem& x, const Unit& u, int panel, float* rows, float* key, float* value) {
  bool hidden[PANEL];
  const int first = panel * PANEL;
  if (BANDS) hidden_keys(x, u.s, u.kv_head, first, hidden);
  const bool* of_hidden = BANDS ? hidden - first : nullptr;
  read_keys(x, u.s, x.k, x.k_scale, x.k_strides, u.kv_head, first, PANEL, (int)x.dim, width(x.dim), of_hidden, rows);
  transposed(rows, (int)x.dim, width(x.dim), key);
  read_keys(x, u.s, x.v, x.v_scale, x.v_strides, u.kv_head, first, PANEL, (int)x.dim_v, width(x.dim_v), of_hidden, value);
}

// What one thread works with.
struct Scratch {
  float *q, *scores, *out, *m, *l, *rows;
  int* visits;

  Scratch(const Problem& x, Arena& arena) {
    const long few = x.few_rows * x.kv_heads, rows_of = few > x.block_rows ? few : x.block_rows, wide = width(x.dim) > width(x.dim_v) ? width(x.dim) : width(x.dim_v);
    q = arena.take<float>(rows_of * width(x.dim));
    scores = arena.take<float>(x.block_rows * x.panels * PANEL);
    out = arena.take<float>(rows_of * width(x.dim_v));
    m = arena.take<float>(rows_of), l = arena.take<float>(rows_of);
    rows = arena.take<float>(PANEL * wide);
    visits = arena.take<int>(panels_of((int)x.nk) + 1);
  }
  Scratch of_rows(const Problem& x, long first) const {  // of a block that begins at a later row
    Scratch w = *this;
    w.q += first * width(x.dim), w.out += first * width(x.dim_v), w.m += first, w.l += first;
    return w;
  }
};

// Takes n panels of scores into the statistics of a block's rows and leaves their probabilities (algorithm 1, lines 8 to 10).
static void update(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int n) {
  const int wide = width(x.dim_v), row_length = (int)x.panels * PANEL;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float *row = w.scores + (long)r * row_length, *out = w.out + (long)r * wide;
    vec top = splat(-INFINITY);
    for (int j = 0; j < n; j++) {
      finish(x, u.s, h, i, visited[j] / 2, visited[j] % 2, row + j * PANEL);
      for (int c = 0; c < PANEL; c += LANES) top = maximum_or_second(load(row + j * PANEL + c), top);
    }
    const float most = largest(top), m = most > w.m[r] ? most : w.m[r], pivot = m == -INFINITY ? 0 : m;
    vec total = {};
    for (int c = 0; c < n * PANEL; c += LANES) {
      const vec p = exp_of(load(row + c) - pivot);
      total += p;
      store(row + c, p);
    }
    if (m != w.m[r]) {
      const float alpha = expf(w.m[r] - pivot);
      w.l[r] *= alpha;
      for (int c = 0; c < wide; c += LANES) store(out + c, load(out + c) * alpha);
      w.m[r] = m;
    }
    w.l[r] += sum(total);
    if (x.dropout)
      for (int j = 0; j < n; j++) {
        alignas(64) uint16_t bits[PANEL];
        random_bits(x, u.s, h, i, visited[j] / 2, bits);
        drop(x, bits, row + j * PANEL);
      }
  }
}

// Q of a block, multiplied by scale, and nothing attended to yet.
static void begin(const Problem& x, const Unit& u, const Block& block, const Scratch& w, float factor) {
  const int dim = (int)x.dim, wide = width(dim);
  for (int r = 0; r < block.rows; r++) {
    float* row = w.q + (long)r * wide;
    read((int)x.q_kind, at(x.q, (int)x.q_kind, u.s.of_query(x.q_strides, block.head_of(r), block.query(r))), 1, dim, row);
    for (int d = 0; d < wide; d++) row[d] = d < dim ? row[d] * factor : 0;
    w.m[r] = -INFINITY, w.l[r] = 0;
  }
  memset(w.out, 0, sizeof(float) * block.rows * width(x.dim_v));
}

// Statistics and O of a block over some of the panels it visits.
static void attend(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int count,
                   const Packed& packed) {
  const int dim = (int)x.dim, wide = width(dim), wide_v = width(x.dim_v), length = (int)x.panels * PANEL;
  begin(x, u, block, w, (float)x.scale);
  for (int done = 0, n; done < count; done += n, visited += n) {
    for (n = 1; done + n < count && visited[n] / 2 / x.panels == visited[0] / 2 / x.panels;) n++;
    for (int j = 0; j < n; j++)
      multiply<false, false>(w.q, wide, packed.key(visited[j] / 2), PANEL, w.scores + j * PANEL, length, block.rows, PANEL, dim);
    update(x, u, block, w, visited, n);
    for (int j = 0, run; j < n; j += run) {         // neighbouring panels as one product
      for (run = 1; j + run < n && visited[j + run] / 2 == visited[j] / 2 + run;) run++;
      multiply<false, true>(w.scores + j * PANEL, length, packed.value(visited[j] / 2), wide_v, w.out, wide_v, block.rows, wide_v,
                            run * PANEL);
    }
  }
}

// Where the keys or values of a panel lie; behind the sequence, the last one.
static void rows_at(const Problem& x, const Sequence& s, const void* from, const long* strides, int h, int panel, const void** rows) {
  for (int j = 0; j < PANEL; j++) {
    const int key = panel * PANEL + j < s.nk ? panel * PANEL + j : s.nk - 1;
    rows[j] = at(from, (int)x.k_kind, s.of_key(x, strides, h, key));
  }
}

// The same for all heads of a sequence with few queries, over a share of the panels; block h_kv has rows from h_kv * x.few_rows.
static void attend_few(const Problem& x, const Sequence& s, const Scratch& all, long share) {
  const int wide = width(x.dim), wide_v = width(x.dim_v), length = (int)x.panels * PANEL;
  int first = panels_of(s.nk), last = -1;
  for (int h = 0; h < x.kv_heads; h++) {
    const Unit u = {s, h};
    const Block block = block_of(x, u, 0);
    begin(x, u, block, all.of_rows(x, h * x.few_rows), (float)x.scale * (x.k_scale ? ((const float*)x.k_scale)[h] : 1));
    const int count = visits(x, s, block, 0, panels_of(s.nk), all.visits);
    if (count && all.visits[0] / 2 < first) first = all.visits[0] / 2;
    if (count && all.visits[count - 1] / 2 > last) last = all.visits[count - 1] / 2;
  }
  const long panels = last < first ? 0 : last + 1 - first;
  for (int p = first + (int)(panels * share / x.splits); p < first + (int)(panels * (share + 1) / x.splits); p++)
    for (int h = 0; h < x.kv_heads; h++) {
      const Unit u = {s, h};
      const Block block = block_of(x, u, 0);
      const Scratch w = all.of_rows(x, h * x.few_rows);
      int visited;
      if (!visits(x, s, block, p, p + 1, &visited)) continue;
      bool hidden[PANEL] = {};
      if (BANDS && visited % 2) hidden_keys(x, s, h, p * PANEL, hidden);
      const void *keys[PANEL], *values[PANEL], *next[PANEL];
      const int next_h = h + 1 < x.kv_heads ? h + 1 : 0, next_p = p + (next_h == 0);
      rows_at(x, s, x.k, x.k_strides, h, p, keys);
      rows_at(x, s, x.v, x.v_strides, h, p, values);
      rows_at(x, s, x.k, x.k_strides, next_h, next_p, next);
      OF_KIND(x.k_kind, scores_of, w.q, wide, keys, (int)x.dim, w.scores, length, block.rows, values, x.dim_v * size_of((int)x.k_kind))
      update(x, u, block, w, &visited, 1);
      int n = 0;                                    // values that are seen
      for (int j = 0; j < PANEL && p * PANEL + j < s.nk; j++) {
        if (hidden[j]) continue;
        values[n] = values[j];
        if (n < j) for (int r = 0; r < block.rows; r++) w.scores[r * length + n] = w.scores[r * length + j];
        n++;
      }
      OF_KIND(x.k_kind, values_of, w.scores, length, values, n, (int)x.dim_v, w.out, wide_v, block.rows, next, x.dim * size_of((int)x.k_kind))
    }
  for (int h = 0; h < x.kv_heads && x.v_scale; h++) {
    float* out = all.out + h * x.few_rows * wide_v;
    for (long e = 0; e < x.few_rows * wide_v; e++) out[e] *= ((const float*)x.v_scale)[h];
  }
}

// Divides by the sums, joins the sink, stores (algorithm 1, lines 12 to 14).
static void finalize(const Problem& x, const Unit& u, const Block& block, const float* out, const float* m, const float* l) {
  const float rescale = 65536.f / (65536 - x.dropout);
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float top = m[r], total = l[r], weight = 1;
    if (x.sinks) {
      float sink;
      read((int)x.sinks_kind, at(x.sinks, (int)x.sinks_kind, h), 1, 1, &sink);
      const float most = sink > top ? sink : top, pivot = most == -INFINITY ? 0 : most;
      weight = expf(top - pivot);
      total = total * weight + expf(sink - pivot);
      top = most;
    }
    const bool empty = total == 0;
    write((int)x.q_kind, at(x.out, (int)x.q_kind, u.s.of_query(x.out_strides, h, i)), out + (long)r * width(x.dim_v), (int)x.dim_v,
          empty ? 0 : weight * rescale / total);
    ((float*)x.lse)[u.s.of_statistics(x, h, i)] = empty ? -INFINITY : top + logf(total);
  }
}

// A part of a block: O [rows, width], then m, then l.
static void store_part(const Problem& x, const Block& block, const Scratch& w, float* part) {
  const long wide = width(x.dim_v);
  memcpy(part, w.out, sizeof(float) * block.rows * wide);
  memcpy(part + block.rows * wide, w.m, sizeof(float) * block.rows);
  memcpy(part + block.rows * (wide + 1), w.l, sizeof(float) * block.rows);
}

// The parts of one block in order, as one (`tilewise/state.py`).
static void merge(const Problem& x, const Block& block, const float* parts, long part, const Scratch& w) {
  const int wide = width(x.dim_v), rows = block.rows;
  for (int r = 0; r < rows; r++) {
    float *out = w.out + (long)r * wide, m = -INFINITY;
    for (int s = 0; s < x.splits; s++) m = parts[s * part + rows * wide + r] > m ? parts[s * part + rows * wide + r] : m;
    for (int c = 0; c < wide; c++) out[c] = 0;
    w.m[r] = m, w.l[r] = 0;
    for (int s = 0; s < x.splits; s++) {
      const float *of = parts + s * part, own = of[rows * wide + r], weight = own == -INFINITY && m == own ? 0 : expf(own - m);
      w.l[r] += weight * of[rows * (wide + 1) + r];
      for (int c = 0; c < wide; c++) out[c] += weight * of[(long)r * wide + c];
    }
  }
}

// Where everything lies in the memory that the caller allocated.
struct Memory {
  long unit_size, part, few_part;
  float *packed, *parts, *few_parts;
  char* scratch;
  long scratch_each;

  Memory(const Problem& x, char* start) {
    Arena arena = {start};
    unit_size = (long)panels_of((int)x.nk) * PANEL * (x.dim + width(x.dim_v));
    part = x.block_rows * (width(x.dim_v) + 2);
    few_part = x.few_rows * (width(x.dim_v) + 2);
    packed = arena.take<float>(x.units_together * unit_size);
    parts = arena.take<float>(x.splits > 1 ? x.units_together * blocks_of(x, (int)x.nq) * x.splits * part : 0);
    few_parts = arena.take<float>(x.splits > 1 ? x.batch * x.kv_heads * x.splits * few_part : 0);
    scratch = arena.next;
    Scratch(x, arena);
    scratch_each = arena.next - scratch;
  }
  Scratch of_worker(const Problem& x, int worker) const {
    Arena arena = {scratch + worker * scratch_each};
    return Scratch(x, arena);
  }
};

// Bytes that `forward` needs at x.scratch.
extern "C" long forward_memory(const Problem* x) {
  const Memory memory(*x, nullptr);
  return (long)memory.scratch + x->threads * memory.scratch_each;
}

static bool has_few(const Problem& x, const Sequence& s) { return s.nq * (x.heads / x.kv_heads) <= x.few_rows; }

// Sequences with few queries: a task for each and each share of its keys.
static void forward_few(const Problem& x, const Memory& memory) {
  const auto part_of = [&](long b, long h) { return memory.few_parts + (b * x.kv_heads + h) * x.splits * memory.few_part; };
  in_parallel(x, x.batch * x.splits, [&](int worker, Tasks tasks) {
    const Scratch all = memory.of_worker(x, worker);
    for (long task; tasks.take(task);) {
      const Sequence s = unit_of(x, task / x.splits * x.kv_heads).s;
      if (!has_few(x, s) || s.nq == 0) continue;
      attend_few(x, s, all, task % x.splits);
      for (int h = 0; h < x.kv_heads; h++) {
        const Block block = block_of(x, Unit{s, h}, 0);
        const Scratch w = all.of_rows(x, h * x.few_rows);
        if (x.splits == 1) finalize(x, Unit{s, h}, block, w.out, w.m, w.l);
        else store_part(x, block, w, part_of(s.b, h) + task % x.splits * memory.few_part);
      }
    }
  });
  if (x.splits > 1)
    in_parallel(x, x.batch * x.kv_heads, [&](int worker, Tasks tasks) {
      const Scratch w = memory.of_worker(x, worker);
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, task);
        if (!has_few(x, u.s) || u.s.nq == 0) continue;
        const Block block = block_of(x, u, 0);
        merge(x, block, part_of(u.s.b, u.kv_head), memory.few_part, w);
        finalize(x, u, block, w.out, w.m, w.l);
      }
    });
}

// The others: so many units at a time as packed keys and values stay in the last cache.
static void forward_many(const Problem& x, const Memory& memory) {
  const long units = x.batch * x.kv_heads, together = x.units_together, block_count = blocks_of(x, (int)x.nq);
  const long panels = panels_of((int)x.nk), part = memory.part;
  const auto packed = [&](long slot) { return packed_of(x, memory.packed + slot * memory.unit_size, panels); };
  for (long first = 0; first < units; first += together) {
    const long here = units - first < together ? units - first : together;
    in_parallel(x, here * panels, [&](int worker, Tasks tasks) {
      const Scratch w = memory.of_worker(x, worker);
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, first + task / panels);
        const Packed to = packed(task / panels);
        const long p = task % panels;
        if (p < panels_of(u.s.nk) && !has_few(x, u.s)) pack_panel(x, u, (int)p, w.rows, to.key(p), to.value(p));
      }
    });
    in_parallel(x, here * block_count * x.splits, [&](int worker, Tasks tasks) {
      const Scratch w = memory.of_worker(x, worker);
      for (long task; tasks.take(task);) {
        const long share = task % x.splits, of_block = task / x.splits, slot = of_block / block_count;
        const long index = block_count - 1 - of_block % block_count;   // under a causal mask the longest first
        const Unit u = unit_of(x, first + slot);
        if (index >= blocks_of(x, u.s.nq) || has_few(x, u.s)) continue;
        const Block block = block_of(x, u, (int)index);
        const long count = visits(x, u.s, block, 0, panels_of(u.s.nk), w.visits);
        const long from = count * share / x.splits, to = count * (share + 1) / x.splits;
        attend(x, u, block, w, w.visits + from, (int)(to - from), packed(slot));
        if (x.splits == 1) finalize(x, u, block, w.out, w.m, w.l);
        else store_part(x, block, w, memory.parts + ((slot * block_count + index) * x.splits + share) * part);
      }
    });
    if (x.splits > 1)
      in_parallel(x, here * block_count, [&](int worker, Tasks tasks) {
        const Scratch w = memory.of_worker(x, worker);
        for (long task; tasks.take(task);) {
          const Unit u = unit_of(x, first + task / block_count);
          if (task % block_count >= blocks_of(x, u.s.nq) || has_few(x, u.s)) continue;
          const Block block = block_of(x, u, (int)(task % block_count));
          merge(x, block, memory.parts + task * x.splits * part, part, w);
          finalize(x, u, block, w.out, w.m, w.l);
        }
      });
  }
}

extern "C" void forward(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, (char*)x.scratch);
  if (x.few_rows) forward_few(x, memory);
  if (x.units_together) forward_many(x, memory);
}
