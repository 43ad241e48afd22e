// The probabilities of each key summed over all queries, given lse: the backward's walk (backward.cpp) with dO = 1 and no values.
//
// A task is a block of keys of one unit; the queries of its group walk past it, so that each sum belongs to one thread and is taken
// in one order.
#include "multiply.h"
#include "pack.h"
#include "scoring.h"
#include "threads.h"

// What one thread works with.
struct Scratch {
  float *q, *scores, *keys, *rows, *lse, *mass;     // mass: [heads of a group, keys of a block]
  int* visits;

  Scratch(const Problem& x, Arena& arena) {
    const long n = x.panels * PANEL, m = x.block_rows, wide = width(x.dim);
    q = arena.take<float>(m * wide), scores = arena.take<float>(m * n), keys = arena.take<float>(n * words(x.dim));
    rows = arena.take<float>(PANEL * wide), lse = arena.take<float>(m), mass = arena.take<float>(x.heads / x.kv_heads * n);
    visits = arena.take<int>(x.panels);
  }
};

// Adds what the rows of a block give to n panels, of which visited[t] is the (visited[t] / 2 - first)-th of the task.
static void add_block(const Problem& x, const Unit& u, const Block& block, const Scratch& w, int first, int n) {
  const long length = x.panels * PANEL;
  for (int r = 0; r < block.rows; r++) {
    const int h = block.head_of(r), i = block.query(r);
    float* sums = w.mass + (h - u.kv_head * (x.heads / x.kv_heads)) * length;
    for (int t = 0; t < n; t++) {
      const int panel = w.visits[t] / 2;
      float *p = w.scores + r * length + t * PANEL, *to = sums + (panel - first) * PANEL;
      for (int c = 0; PAIRS && c < PANEL; c += LANES) store(p + c, load(p + c) * (float)x.scale);
      finish(x, u.s, h, i, panel, w.visits[t] % 2, p);
      for (int c = 0; c < PANEL; c += LANES) store(to + c, load(to + c) + exp_of(load(p + c) - w.lse[r]));
    }
  }
}

// The sums of n panels of keys from `first` on.
static void key_block(const Problem& x, const Unit& u, const Scratch& w, int first, int n) {
  const int dim = (int)x.dim, wide = width(dim), group = (int)(x.heads / x.kv_heads);
  const long length = x.panels * PANEL;
  for (int t = 0; t < n; t++) {
    const Panel panel(x, u, first + t);
    panel.pack(x.k, x.k_strides, x.k_scale, dim, w.rows, nullptr, w.keys + (long)t * PANEL * words(dim));
  }
  memset(w.mass, 0, sizeof(float) * group * length);
  for (int index = 0; index < blocks_of(x, u.s.nq); index++) {
    const Block block = block_of(x, u, index);
    const int count = visits(x, u.s, block, first, first + n, w.visits);
    if (!count) continue;
    read_queries(x, u, block, x.q, x.q_strides, dim, (float)x.scale, w.q);
    read_lse(x, u, block, w.lse);
    for (int t = 0; t < count; t++)
      multiply<false, false>(w.q, wide, w.keys + (long)(w.visits[t] / 2 - first) * PANEL * words(dim), PANEL, w.scores + t * PANEL,
                             length, block.rows, PANEL, dim);
    add_block(x, u, block, w, first, count);
  }
  const long slot = x.cached ? u.s.b : u.s.k_slot, start = x.cached ? 0 : u.s.k_start, left = u.s.nk - (long)first * PANEL;
  for (int member = 0; member < group; member++)
    memcpy((float*)x.key_mass + (slot * x.heads + u.kv_head * group + member) * x.key_mass_rows + start + first * PANEL,
           w.mass + member * length, sizeof(float) * (left < n * PANEL ? left : n * PANEL));
}

// Bytes that `key_mass` needs at x.scratch.
extern "C" long key_mass_memory(const Problem* x) {
  return Workers<Scratch>(*x, Arena{nullptr}).end(*x);
}

extern "C" void key_mass(const Problem* problem) {
  const Problem& x = *problem;
  const Workers<Scratch> workers(x, Arena{(char*)x.scratch});
  const long steps = (panels_of((int)x.nk) + x.panels - 1) / x.panels;
  in_parallel(x, x.batch * x.kv_heads * steps, [&](int worker, Tasks tasks) {
    const Scratch w = workers.of(x, worker);
    for (long task; tasks.take(task);) {
      const Unit u = unit_of(x, task / steps);
      const int first = (int)(task % steps * x.panels), left = panels_of(u.s.nk) - first;
      if (left > 0) key_block(x, u, w, first, left < x.panels ? left : (int)x.panels);
    }
  });
}
