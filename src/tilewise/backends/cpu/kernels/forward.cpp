// FlashAttention-2, forward (Dao 2023, algorithm 1), on a CPU.
//
// A thread takes a block of queries of one key head and keeps Q, a tile of scores and O in its L2 cache; scores never reach
// memory. Keys come as panels [D, PANEL], ready for the products' vectors, values as rows, packed once for all blocks of a head.
// Keys may be cut into shares, each a task of its own, merged in order afterwards (Flash-Decoding).
//
// Panels are walked in groups of `x.panels`. If `x.aligned`, groups begin at multiples of that and values are added panel by panel,
// so that a row's sums do not depend on the rows beside it.
#include "multiply.h"
#include "pack.h"
#include "softmax.h"
#include "threads.h"

// What one thread works with.
struct Scratch {
  State state;
  float *scores, *rows;
  int* visits;

  Scratch(const Problem& x, Arena& arena)
      : state(x, arena, x.block_rows), scores(arena.take<float>(x.block_rows * x.panels * PANEL)),
        rows(arena.take<float>(PANEL * (width(x.dim) > width(x.dim_v) ? width(x.dim) : width(x.dim_v)))),
        visits(arena.take<int>(panels_of((int)x.nk) + 1)) {}
};

// Statistics and O of a block over some of the panels it visits.
static void attend(const Problem& x, const Unit& u, const Block& block, const Scratch& w, const int* visited, int count,
                   const Packed& packed) {
  const int dim = (int)x.dim, wide = width(dim), wide_v = width(x.dim_v), length = (int)x.panels * PANEL;
  begin(x, u, block, w.state, PAIRS ? 1 : (float)x.scale);
  for (int done = 0, n; done < count; done += n, visited += n) {
    n = group_of(x, visited, count - done);
    for (int j = 0; j < n; j++)
      multiply<false, false>(w.state.q, wide, packed.key(visited[j] / 2), PANEL, w.scores + j * PANEL, length, block.rows,
                             columns_of(u.s, visited + j, 1), dim);
    update(x, u, block, w.state, w.scores, length, visited, n, PAIRS ? (float)x.scale : 1);
    for (int r = 0; PAIRS && r < block.rows; r++) pair_columns(w.scores + (long)r * length, columns_of(u.s, visited, n));
    for (int j = 0, run; j < n; j += run) {         // neighbouring panels as one product
      run = x.aligned ? 1 : neighbours(visited + j, n - j);
      multiply<false, true>(w.scores + words(j * PANEL), length, packed.value(visited[j] / 2), wide_v, w.state.out, wide_v, block.rows, wide_v,
                            u.s.keys_of(visited[j] / 2, run));
    }
  }
}

// Where everything lies in the memory that the caller allocated.
struct Memory {
  long unit_size, part;
  float *packed, *parts;
  Workers<Scratch> workers;

  Memory(const Problem& x, Arena arena)
      : unit_size(Packed::size(x, panels_of((int)x.nk))), part(part_size(x, x.block_rows)),
        packed(arena.take<float>(x.units_together * unit_size)),
        parts(arena.take<float>(x.splits > 1 ? x.units_together * blocks_of(x, (int)x.nq) * x.splits * part : 0)),
        workers(x, arena) {}
};

// Bytes that `forward` needs at x.scratch.
extern "C" long forward_memory(const Problem* x) {
  return Memory(*x, Arena{nullptr}).workers.end(*x);
}

// So many units at a time as packed keys and values stay in the last cache.
extern "C" void forward(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, Arena{(char*)x.scratch});
  const long units = x.batch * x.kv_heads, together = x.units_together, block_count = blocks_of(x, (int)x.nq);
  const long panels = panels_of((int)x.nk), part = memory.part;
  const auto packed = [&](long slot) { return Packed(x, memory.packed + slot * memory.unit_size, panels); };
  for (long first = 0; first < units; first += together) {
    const long here = units - first < together ? units - first : together;
    in_parallel(x, here * panels, [&](int worker, Tasks tasks) {
      const Scratch w = memory.workers.of(x, worker);
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, first + task / panels);
        const Packed to = packed(task / panels);
        const long p = task % panels;
        if (p >= panels_of(u.s.nk) || has_few(x, u.s)) continue;
        const Panel panel(x, u, (int)p);
        panel.pack(x.k, x.k_strides, x.k_scale, (int)x.dim, w.rows, nullptr, to.key(p));
        panel.pack(x.v, x.v_strides, x.v_scale, (int)x.dim_v, w.rows, to.value(p), nullptr);
      }
    });
    in_parallel(x, here * block_count * x.splits, [&](int worker, Tasks tasks) {
      const Scratch w = memory.workers.of(x, worker);
      for (long task; tasks.take(task);) {
        const long share = task % x.splits, of_block = task / x.splits, slot = of_block / block_count;
        const long index = block_count - 1 - of_block % block_count;   // under a causal mask the longest first
        const Unit u = unit_of(x, first + slot);
        if (index >= blocks_of(x, u.s.nq) || has_few(x, u.s)) continue;
        const Block block = block_of(x, u, (int)index);
        const long count = visits(x, u.s, block, 0, panels_of(u.s.nk), w.visits);
        const long from = count * share / x.splits, to = count * (share + 1) / x.splits;
        attend(x, u, block, w, w.visits + from, (int)(to - from), packed(slot));
        if (x.splits == 1) finalize(x, u, block, w.state);
        else store_part(x, block, w.state, memory.parts + ((slot * block_count + index) * x.splits + share) * part);
      }
    });
    if (x.splits > 1)
      in_parallel(x, here * block_count, [&](int worker, Tasks tasks) {
        const Scratch w = memory.workers.of(x, worker);
        for (long task; tasks.take(task);) {
          const Unit u = unit_of(x, first + task / block_count);
          if (task % block_count >= blocks_of(x, u.s.nq) || has_few(x, u.s)) continue;
          const Block block = block_of(x, u, (int)(task % block_count));
          merge(x, block, memory.parts + task * x.splits * part, part, w.state);
          finalize(x, u, block, w.state);
        }
      });
  }
}
