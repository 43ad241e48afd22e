// Which panels of keys a block of queries visits.
#pragma once
#include "functions.h"
#include "rows.h"

static inline int panels_of(int keys) { return (keys + PANEL - 1) / PANEL; }

// The panels from `from` to `to` that a block visits, ascending, each as 2 * panel + (1 if it needs the mask); returns how many.
static int visits(const Problem& x, const Sequence& s, const Block& block, int from, int to, int* found) {
  int count = 0;
  if (!HAS_MASK) {
    for (int p = from; p < to; p++) found[count++] = 2 * p + ((p + 1) * PANEL > s.nk);
    return count;
  }
  if (BANDS == 0) {  // lists by `trace/tile_lists.py`: full panels, then partial ones, each ascending
    const int* list = (const int*)x.list;
    long row = block.first / x.block_rows;
    if (x.list_heads) row += block.head * x.list_rows;
    if (x.list_batch) row += s.b * (x.list_heads ? x.heads : 1) * x.list_rows;
    int full = list[2 * row], partial = list[2 * row + 1];
    const int full_end = partial, end = list[2 * row + 2];
    while (full < full_end && list[full] < from) full++;
    while (partial < end && list[partial] < from) partial++;
    for (;;) {
      const int next_full = full < full_end ? list[full] : to, next_partial = partial < end ? list[partial] : to;
      if (next_full >= to && next_partial >= to) break;
      found[count++] = next_full < next_partial ? 2 * list[full++] : 2 * list[partial++] + 1;
    }
    return count;
  }
  long first[BANDS + 1], last[BANDS + 1], inner_first[BANDS + 1], inner_last[BANDS + 1], band[4 * BANDS + 1];
  for (int i = 0; i < BANDS; i++) first[i] = s.nk, last[i] = -1, inner_first[i] = 0, inner_last[i] = s.nk - 1;
  for (int r = 0; r < block.rows; r += MASK_OF_HEADS ? 1 : block.heads) {
    keys(x, s.b, block.head_of(r), block.query(r), s.nq, s.nk, band);
    for (int i = 0; i < BANDS; i++) {
      const long *b = band + 4 * i;
      if (b[0] <= b[1]) first[i] = b[0] < first[i] ? b[0] : first[i], last[i] = b[1] > last[i] ? b[1] : last[i];
      inner_first[i] = b[2] > inner_first[i] ? b[2] : inner_first[i];
      inner_last[i] = b[3] < inner_last[i] ? b[3] : inner_last[i];
    }
  }
  for (int p = from; p < to; p++) {
    const long start = (long)p * PANEL, end = start + PANEL - 1;
    bool seen = false, full = false;
    for (int i = 0; i < BANDS; i++) {
      seen |= first[i] <= end && last[i] >= start;
      full |= inner_first[i] <= start && inner_last[i] >= end;
    }
    if (seen) found[count++] = 2 * p + !full;
  }
  return count;
}

// Columns that scores of n visited panels have, in whole vectors of words.
static inline int columns_of(const Sequence& s, const int* visited, int n) {
  return (n - 1) * PANEL + width(s.keys_of(visited[n - 1] / 2));
}

// How many of n visited panels, from the first on, are neighbours: they are one product with values.
static inline int neighbours(const int* visited, int n) {
  int run = 1;
  while (run < n && visited[run] / 2 == visited[0] / 2 + run) run++;
  return run;
}

// How many of `count` visited panels form the first group; if `x.aligned`, those between two multiples of `x.panels`.
static inline int group_of(const Problem& x, const int* visited, int count) {
  const auto together = [&](int j) { return x.aligned ? visited[j] / 2 / x.panels == visited[0] / 2 / x.panels : j < x.panels; };
  int n = 1;
  while (n < count && together(n)) n++;
  return n;
}

// Whether a query sees no key, or a key is seen by no query of a group, as far as intervals tell: it may be padding.
static bool nothing_seen(const long* band, long n) {
  for (int i = 0; i < BANDS; i++)
    if (band[4 * i] <= band[4 * i + 1] && band[4 * i] < n && band[4 * i + 1] >= 0) return false;
  return BANDS > 0;
}
static bool hidden_query(const Problem& x, const Sequence& s, int h, int i) {
  long band[4 * BANDS + 1];
  keys(x, s.b, h, i, s.nq, s.nk, band);
  return nothing_seen(band, s.nk);
}
static void hidden_keys(const Problem& x, const Sequence& s, int kv_head, int panel, bool* hidden) {
  long band[4 * BANDS + 1];
  const int group = (int)(x.heads / x.kv_heads);
  for (int j = 0; j < s.keys_of(panel); j++) {
    hidden[j] = BANDS > 0;
    for (int h = kv_head * group; h < (MASK_OF_HEADS ? (kv_head + 1) * group : kv_head * group + 1) && hidden[j]; h++) {
      queries(x, s.b, h, panel * PANEL + j, s.nq, s.nk, band);
      hidden[j] = nothing_seen(band, s.nq);
    }
  }
}
