// FlashAttention-2, forward (Dao 2023, algorithm 1), on a CPU, and Flash-Decoding.
//
// A thread takes a block of queries of one key head and keeps Q, a tile of scores and O in its L2 cache; scores never reach
// memory. Keys come as panels [D, 64], ready for the products' vectors, values as rows: packed once for all blocks of a head
// (`pack`), or, where a head has one block only, by that block as it goes. A block's keys may be cut into shares, each a task of
// its own, merged in order afterwards.
//
// Panels are walked in groups that begin at multiples of `x.panels`, so that a row's sums do not depend on the rows beside it.
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
  Packed own;                                       // of a block that packs for itself

  Scratch(const Problem& x, Arena& arena) {
    const long rows_of = x.block_rows, wide = width(x.dim) > width(x.dim_v) ? width(x.dim) : width(x.dim_v);
    q = arena.take<float>(rows_of * x.dim);
    scores = arena.take<float>(rows_of * x.panels * PANEL);
    out = arena.take<float>(rows_of * width(x.dim_v));
    m = arena.take<float>(rows_of), l = arena.take<float>(rows_of);
    rows = arena.take<float>(PANEL * wide);
    visits = arena.take<int>(panels_of((int)x.nk) + 1);
    own = packed_of(x, arena.take<float>(x.pack_apart ? 0 : x.panels * PANEL * (x.dim + width(x.dim_v))), x.panels);
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

// Statistics and O of a block over some of the panels it visits.
static void attend(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int count,
                   const Packed* packed) {
  const int wide = width(x.dim_v), row_length = (int)x.panels * PANEL, dim = (int)x.dim;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    read((int)x.q_kind, at(x.q, (int)x.q_kind, u.s.of_query(x.q_strides, h, i)), 1, dim, w.q + (long)r * dim);
    for (int d = 0; d < dim; d++) w.q[(long)r * dim + d] *= (float)x.scale;
    w.m[r] = -INFINITY, w.l[r] = 0;
  }
  memset(w.out, 0, sizeof(float) * block.rows * wide);
  for (int done = 0, n; done < count; done += n, visited += n) {
    for (n = 1; done + n < count && visited[n] / 2 / x.panels == visited[0] / 2 / x.panels;) n++;
    for (int j = 0; j < n; j++) {
      const int panel = visited[j] / 2;
      if (!packed) pack_panel(x, u, panel, w.rows, w.own.key(j), w.own.value(j));
      multiply<false, false>(w.q, dim, packed ? packed->key(panel) : w.own.key(j), PANEL, w.scores + j * PANEL, row_length,
                             block.rows, PANEL, dim);
    }
    update(x, u, block, w, visited, n);
    for (int j = 0, run; j < n; j += run) {  // neighbouring panels as one product
      for (run = 1; j + run < n && (!packed || visited[j + run] / 2 == visited[j] / 2 + run);) run++;
      const float* values = packed ? packed->value(visited[j] / 2) : w.own.value(j);
      multiply<false, true>(w.scores + j * PANEL, row_length, values, wide, w.out, wide, block.rows, wide, run * PANEL);
    }
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

// The parts of one block in order, as one (`tilewise/state.py`). A part: O [rows, width], then m, then l.
static void merge(const Problem& x, const Block& block, const float* parts, long part, float* out, float* m, float* l) {
  const int wide = width(x.dim_v);
  for (int r = 0; r < block.rows; r++) {
    m[r] = -INFINITY, l[r] = 0;
    for (int s = 0; s < x.splits; s++) {
      const float own = parts[s * part + x.block_rows * wide + r];
      m[r] = own > m[r] ? own : m[r];
    }
    for (int c = 0; c < wide; c++) out[(long)r * wide + c] = 0;
    for (int s = 0; s < x.splits; s++) {
      const float *of = parts + s * part, weight = of[x.block_rows * wide + r] == -INFINITY ? 0 : expf(of[x.block_rows * wide + r] - m[r]);
      l[r] += weight * of[x.block_rows * (wide + 1) + r];
      for (int c = 0; c < wide; c++) out[(long)r * wide + c] += weight * of[(long)r * wide + c];
    }
  }
}

// Where everything lies in the memory that the caller allocated.
struct Memory {
  long unit_size, part;
  float *packed, *parts;
  char* scratch;
  long scratch_each;

  Memory(const Problem& x, char* start) {
    Arena arena = {start};
    unit_size = (long)panels_of((int)x.nk) * PANEL * (x.dim + width(x.dim_v));
    part = x.block_rows * (width(x.dim_v) + 2);
    packed = arena.take<float>(x.pack_apart ? x.units_together * unit_size : 0);
    parts = arena.take<float>(x.splits > 1 ? x.units_together * blocks_of(x, (int)x.nq) * x.splits * part : 0);
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

extern "C" void forward(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, (char*)x.scratch);
  const long units = x.batch * x.kv_heads, together = x.units_together, block_count = blocks_of(x, (int)x.nq);
  const long panels = panels_of((int)x.nk), part = memory.part;
  float* parts = memory.parts;
  const auto packed = [&](long slot) { return packed_of(x, memory.packed + slot * memory.unit_size, panels); };
  for (long first = 0; first < units; first += together) {
    const long here = units - first < together ? units - first : together;
    if (x.pack_apart)
      in_parallel(x, here * panels, [&](int worker, Tasks tasks) {
        const Scratch w = memory.of_worker(x, worker);
        for (long task; tasks.take(task);) {
          const Unit u = unit_of(x, first + task / panels);
          const Packed to = packed(task / panels);
          const long p = task % panels;
          if (p < panels_of(u.s.nk)) pack_panel(x, u, (int)p, w.rows, to.key(p), to.value(p));
        }
      });
    in_parallel(x, here * block_count * x.splits, [&](int worker, Tasks tasks) {
      const Scratch w = memory.of_worker(x, worker);
      for (long task; tasks.take(task);) {
        const long share = task % x.splits, of_block = task / x.splits, slot = of_block / block_count;
        const long index = block_count - 1 - of_block % block_count;   // under a causal mask the longest first
        const Unit u = unit_of(x, first + slot);
        if (index >= blocks_of(x, u.s.nq)) continue;
        const Block block = block_of(x, u, (int)index);
        const int count = visits(x, u.s, block, 0, panels_of(u.s.nk), w.visits);
        const int from = (int)(count * share / x.splits), to = (int)(count * (share + 1) / x.splits);
        const Packed of_unit = packed(slot);
        attend(x, u, block, w, w.visits + from, to - from, x.pack_apart ? &of_unit : nullptr);
        if (x.splits == 1) {
          finalize(x, u, block, w.out, w.m, w.l);
          continue;
        }
        float* own = parts + ((slot * block_count + index) * x.splits + share) * part;
        memcpy(own, w.out, sizeof(float) * block.rows * width(x.dim_v));
        memcpy(own + x.block_rows * width(x.dim_v), w.m, sizeof(float) * block.rows);
        memcpy(own + x.block_rows * (width(x.dim_v) + 1), w.l, sizeof(float) * block.rows);
      }
    });
    if (x.splits > 1)
      in_parallel(x, here * block_count, [&](int worker, Tasks tasks) {
        const Scratch w = memory.of_worker(x, worker);
        for (long task; tasks.take(task);) {
          const Unit u = unit_of(x, first + task / block_count);
          if (task % block_count >= blocks_of(x, u.s.nq)) continue;
          const Block block = block_of(x, u, (int)(task % block_count));
          merge(x, block, parts + task * x.splits * part, part, w.out, w.m, w.l);
          finalize(x, u, block, w.out, w.m, w.l);
        }
      });
  }
}
