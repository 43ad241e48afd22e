// Rows of keys, values and queries as products take them; 0 where nothing is seen, since padding may hold NaN.
#pragma once
#include "visits.h"
#include "work.h"

// A panel of a unit's keys, from K, V or their tangents.
struct Panel {
  const Problem& x;
  const Unit& u;
  int first, keys;                                  // how many keys there are
  bool hidden[PANEL];

  Panel(const Problem& x, const Unit& u, int panel) : x(x), u(u), first(panel * PANEL), keys(u.s.keys_of(panel)) {
    if (BANDS) hidden_keys(x, u.s, u.kv_head, panel, hidden);
  }
  // Rows of words [keys, width of dim].
  void rows(const void* from, const long* strides, const void* scales, int dim, float* to) const {
    read_keys(x, u.s, from, scales, strides, u.kv_head, first, keys, dim, width(dim), BANDS ? hidden : nullptr, to);
  }
  // The same as words along the rows, and across [words of dim, PANEL], 0 behind the keys up to whole vectors; null: not wanted.
  // own: room for rows.
  void pack(const void* from, const long* strides, const void* scales, int dim, float* own, float* along, float* across) const {
    if (!PAIRS && along) own = along;
    rows(from, strides, scales, dim, own);
    if (PAIRS && along) pair_all_rows(own, width(dim), keys, width(dim), along, width(dim));
    if (!across) return;
    if (keys < width(keys)) memset(own + keys * width(dim), 0, sizeof(float) * (width(keys) - keys) * width(dim));
    transposed(own, width(keys), words(dim), width(dim), across);
  }
};

// Keys [words of D, PANEL] and values [words of PANEL, width of DV] of a unit, panel by panel.
struct Packed {
  float *k, *v;
  long k_panel, v_panel;

  Packed(const Problem& x, float* at, long panels)
      : k(at), v(at + panels * PANEL * words(x.dim)), k_panel((long)PANEL * words(x.dim)), v_panel((long)words(PANEL) * width(x.dim_v)) {}
  float* key(long p) const { return k + p * k_panel; }
  float* value(long p) const { return v + p * v_panel; }
  static long size(const Problem& x, long panels) { return panels * (PANEL * words(x.dim) + words(PANEL) * width(x.dim_v)); }
};

// Rows of a block from a tensor that lies like Q or out, as words [rows, width of dim], without PAIRS times a factor.
static void read_queries(const Problem& x, const Unit& u, const Block& block, const void* from, const long* strides, int dim,
                         float factor, float* to) {
  const int kind = (int)x.q_kind;
  const auto row = [&](int r) { return at(from, kind, u.s.of_query(strides, block.head_of(r), block.query(r))); };
  for (int r = 0; r < block.rows; r++, to += width(dim)) {
    if (r + AHEAD < block.rows) ask_for(row(r + AHEAD), dim * size_of(kind));
    if (BANDS && hidden_query(x, u.s, block.head_of(r), block.query(r))) memset(to, 0, sizeof(float) * width(dim));
    else read_words(kind, row(r), dim, width(dim), PAIRS ? 1 : factor, to);
  }
}

// A number for each row of a block, from a tensor that lies like lse.
static void read_statistics(const Problem& x, const Unit& u, const Block& block, const void* from, float* to) {
  for (int r = 0; r < block.rows; r++) to[r] = ((const float*)from)[u.s.of_statistics(x, block.head_of(r), block.query(r))];
}

// lse as what scores lack for probabilities, which are 0 where no key is seen.
static void read_lse(const Problem& x, const Unit& u, const Block& block, float* to) {
  read_statistics(x, u, block, x.lse, to);
  for (int r = 0; r < block.rows; r++) if (to[r] == -INFINITY) to[r] = INFINITY;
}
