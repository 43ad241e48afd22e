// Flash-Decoding on a CPU: sequences with few queries, whose speed is that of reading keys and values once.
//
// Keys and values are read where they lie, in their own dtype, panel by panel: the keys of all heads in turn, then their values.
// What is read next is asked for in its order in memory, where heads lie side by side. The keys of a sequence are cut into shares,
// each a task of its own, merged in order afterwards.
#include "few.h"
#include "softmax.h"
#include "threads.h"

// What one thread works with: the blocks of all key heads, that of h_kv from row h_kv * x.few_rows.
struct Scratch {
  State state;
  float* scores;                                    // [heads, queries of a block, PANEL]
  int *visits, *visited;                            // of one block; of each head, the panel at hand, or -1

  Scratch(const Problem& x, Arena& arena)
      : state(x, arena, x.few_rows * x.kv_heads), scores(arena.take<float>(x.kv_heads * x.few_rows * PANEL)),
        visits(arena.take<int>(panels_of((int)x.nk) + 1)), visited(arena.take<int>(x.kv_heads)) {}
};

// Where n keys or values of a panel lie; behind the sequence, the last one.
static void rows_at(const Problem& x, const Sequence& s, const void* from, const long* strides, int h, int panel, int n,
                    const void** rows) {
  for (int j = 0; j < n; j++) {
    const int key = panel * PANEL + j < s.nk ? panel * PANEL + j : s.nk - 1;
    rows[j] = at(from, STORED, s.of_key(x, strides, h, key));
  }
}

// The h-th share, n rows, of a panel's n * H_kv rows over all heads, in the order in which they lie in memory.
static void share_of_rows(const Problem& x, const Sequence& s, const void* from, const long* strides, int h, int panel, int n,
                          const void** rows) {
  int key = panel * PANEL + h * n / (int)x.kv_heads, head = h * n % (int)x.kv_heads;
  for (int j = 0; j < n; j++) {
    rows[j] = at(from, STORED, s.of_key(x, strides, head, key < s.nk ? key : s.nk - 1));
    if (++head == x.kv_heads) head = 0, key++;
  }
}

// Scores of head h with a panel of keys, taken into its statistics; meanwhile values of the panel are asked for.
static void take_keys(const Problem& x, const Unit& u, const Block& block, const State& w, int panel, const int* visited,
                      float* scores) {
  const void *keys[PANEL], *later[PANEL];
  const int n = (u.s.keys_of(panel) + KEYS - 1) / KEYS * KEYS;
  rows_at(x, u.s, x.k, x.k_strides, u.kv_head, panel, n, keys);
  share_of_rows(x, u.s, x.v, x.v_strides, u.kv_head, panel, n, later);
  scores_of<STORED>(w.q, width(x.dim), keys, n, (int)x.dim, scores, PANEL, block.rows, later, x.dim_v * size_of(STORED));
  update(x, u, block, w, scores, PANEL, visited, 1, PAIRS ? (float)x.scale : 1);
}

// Adds probabilities times values to O; meanwhile keys of the next panel are asked for.
static void take_values(const Problem& x, const Unit& u, const Block& block, const State& w, int panel, bool partial, float* scores) {
  const void *values[PANEL], *later[PANEL];
  bool hidden[PANEL] = {};
  const int there = u.s.keys_of(panel), columns = width(there);
  if (BANDS && partial) hidden_keys(x, u.s, u.kv_head, panel, hidden);
  rows_at(x, u.s, x.v, x.v_strides, u.kv_head, panel, there, values);
  share_of_rows(x, u.s, x.k, x.k_strides, u.kv_head, panel + 1, columns, later);
  int n = 0;                                        // values that are seen
  for (int j = 0; j < there; j++) {
    if (hidden[j]) continue;
    values[n] = values[j];
    if (n < j) for (int r = 0; r < block.rows; r++) scores[r * PANEL + n] = scores[r * PANEL + j];
    n++;
  }
  for (int r = 0; r < block.rows; r++) pair_columns(scores + r * PANEL, columns);
  values_of<STORED>(scores, PANEL, values, n, (int)x.dim_v, w.out, width(x.dim_v), block.rows, later, x.dim * size_of(STORED));
}

// Statistics and O of all heads of a sequence over a share of the panels.
static void attend(const Problem& x, const Sequence& s, const Scratch& all, long share) {
  int first = panels_of(s.nk), last = -1;
  for (int h = 0; h < x.kv_heads; h++) {
    const Unit u = {s, h};
    const Block block = block_of(x, u, 0);
    begin(x, u, block, State(x, all.state, h * x.few_rows),
          PAIRS ? 1 : (float)x.scale * (x.k_scale ? ((const float*)x.k_scale)[h] : 1));
    const int count = visits(x, s, block, 0, panels_of(s.nk), all.visits);
    if (count && all.visits[0] / 2 < first) first = all.visits[0] / 2;
    if (count && all.visits[count - 1] / 2 > last) last = all.visits[count - 1] / 2;
  }
  const long panels = last < first ? 0 : last + 1 - first;
  for (int p = first + (int)(panels * share / x.splits); p < first + (int)(panels * (share + 1) / x.splits); p++)
    for (int turn = 0; turn < 2; turn++)
      for (int h = 0; h < x.kv_heads; h++) {
        const Unit u = {s, h};
        const Block block = block_of(x, u, 0);
        const State w = State(x, all.state, h * x.few_rows);
        float* scores = all.scores + h * x.few_rows * PANEL;
        int* visited = all.visited + h;
        if (turn == 0 && !visits(x, s, block, p, p + 1, visited)) *visited = -1;
        if (*visited < 0) continue;
        if (turn == 0) take_keys(x, u, block, w, p, visited, scores);
        else take_values(x, u, block, w, p, *visited % 2, scores);
      }
  for (int h = 0; h < x.kv_heads && x.v_scale; h++) {
    float* out = all.state.out + h * x.few_rows * width(x.dim_v);
    for (long e = 0; e < x.few_rows * width(x.dim_v); e++) out[e] *= ((const float*)x.v_scale)[h];
  }
}

// Where everything lies in the memory that the caller allocated.
struct Memory {
  long part;
  float* parts;
  Workers<Scratch> workers;

  Memory(const Problem& x, Arena arena)
      : part(part_size(x, x.few_rows)),
        parts(arena.take<float>(x.splits > 1 ? x.batch * x.kv_heads * x.splits * part : 0)), workers(x, arena) {}
};

// Bytes that `decode` needs at x.scratch.
extern "C" long decode_memory(const Problem* x) {
  return Memory(*x, Arena{nullptr}).workers.end(*x);
}

extern "C" void decode(const Problem* problem) {
  const Problem& x = *problem;
  const Memory memory(x, Arena{(char*)x.scratch});
  const auto part_of = [&](long b, long h) { return memory.parts + (b * x.kv_heads + h) * x.splits * memory.part; };
  in_parallel(x, x.batch * x.splits, [&](int worker, Tasks tasks) {
    const Scratch all = memory.workers.of(x, worker);
    for (long task; tasks.take(task);) {
      const Sequence s = unit_of(x, task / x.splits * x.kv_heads).s;
      if (!has_few(x, s) || s.nq == 0) continue;
      attend(x, s, all, task % x.splits);
      for (int h = 0; h < x.kv_heads; h++) {
        const Block block = block_of(x, Unit{s, h}, 0);
        const State w = State(x, all.state, h * x.few_rows);
        if (x.splits == 1) finalize(x, Unit{s, h}, block, w);
        else store_part(x, block, w, part_of(s.b, h) + task % x.splits * memory.part);
      }
    }
  });
  if (x.splits > 1)
    in_parallel(x, x.batch * x.kv_heads, [&](int worker, Tasks tasks) {
      const Scratch w = memory.workers.of(x, worker);
      for (long task; tasks.take(task);) {
        const Unit u = unit_of(x, task);
        if (!has_few(x, u.s) || u.s.nq == 0) continue;
        const Block block = block_of(x, u, 0);
        merge(x, block, part_of(u.s.b, u.kv_head), memory.part, w.state);
        finalize(x, u, block, w.state);
      }
    });
}
