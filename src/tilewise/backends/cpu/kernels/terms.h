// Gradients of the bias and of captured tensors: where the terms dS * factor of one query go (`trace/learned.py`).
//
//   BY_ENTRY   to the entry (b, h, i, j) of a matrix; if it is shared, added by the jobs that have its keys, unit by unit
//   BY_KEY     to a sum over queries for each key of each head     [B, H, keys]
//   BY_QUERY   to a sum over keys for each query                   [lists, B, H, queries]
//   DIAGONAL   to a sum for each i - j                             [lists, B, H, queries + keys - 1]
//   ANY        to the entry of the table that `place` tells        [lists, table], fp64
//
// keys is a multiple of PANEL; diagonals count from the last of them.
#pragma once
#include "functions.h"
#include "rows.h"
#include "scoring.h"

static inline vec backwards(vec x) { vec y; for (int i = 0; i < LANES; i++) y[i] = x[LANES - 1 - i]; return y; }

struct Terms {
  const Problem& x;
  const Sequence& s;
  int h, i, list;
  long row, padded;                                 // b * H + h; keys
  float bias_sum = 0, sums[LOOKUPS + 1] = {};

  Terms(const Problem& x, const Sequence& s, int h, int i, int list)
      : x(x), s(s), h(h), i(i), list(list), row(s.b * x.heads + h), padded((x.nk + PANEL - 1) / PANEL * PANEL) {}

  // The terms of a panel: ds has the gradients of finished scores.
  void of_bias(int panel, const float* ds) {
    if (x.dbias) add((int)x.bias_pattern, x.dbias, x.dbias_strides, x.dbias_kind, panel * PANEL, ds, bias_sum);
  }

  // raw has scale * q.k, p the probabilities.
  void of_tables(int panel, bool partial, const float* raw, const float* ds, const float* p) {
    const int first = panel * PANEL, columns = width(s.keys_of(panel));
    for (int n = 0; n < LOOKUPS; n++) {
      void* to = ((void* const*)x.sums)[n];
      if (!to) continue;
      float terms[PANEL];
      for (int c = 0; c < columns; c += LANES) {
        const ivec k = keys_from(first + c, s.nk);
        const vec t = load(ds + c) * factor(n, x, load(raw + c), s.b, h, i, k, s.nq, s.nk);
        store(terms + c, partial ? select(load(p + c) == 0.f, vec{}, t) : t);
        if (PATTERNS[n] != ANY) continue;
        const lvec to_entry = place(n, x, s.b, h, i, k, s.nq, s.nk);
        double* table = (double*)to + list * ((const long*)x.sums_sizes)[n];
        for (int lane = 0; lane < LANES; lane++) table[to_entry[lane]] += terms[c + lane];
      }
      if (PATTERNS[n] != ANY) add(PATTERNS[n], to, (const long*)x.sums_strides + 4 * n, FP32, first, terms, sums[n]);
    }
  }

  void add(int pattern, void* to, const long* strides, long kind, int first, const float* terms, float& sum_of_row) {
    float* sums = (float*)to;
    const int n = s.keys_of(first / PANEL), columns = width(n);
    if (pattern == BY_ENTRY) {
      const long element = s.b * strides[0] + h * strides[1] + i * strides[2] + first;
      if (kind != FP32) write((int)kind, at(to, (int)kind, element), terms, n, 1);
      else for (int c = 0; c < n; c++) sums[element + c] += terms[c];
    } else if (pattern == BY_KEY) {
      float* own = sums + row * padded + first;
      for (int c = 0; c < columns; c += LANES) store(own + c, load(own + c) + load(terms + c));
    } else if (pattern == BY_QUERY) {
      vec total = {};
      for (int c = 0; c < columns; c += LANES) total += load(terms + c);
      sum_of_row += sum(total);
    } else {
      const long length = x.nq + padded - 1;
      float* own = sums + (list * x.batch * x.heads + row) * length + i + padded - 1 - first;
      for (int c = 0; c < columns; c += LANES) {
        float* from = own - c - (LANES - 1);
        store(from, load(from) + backwards(load(terms + c)));
      }
    }
  }

  // After the last panel of a block of keys.
  void finish() {
    const long place = (list * x.batch * x.heads + row) * x.nq + i;
    if (x.dbias && x.bias_pattern == BY_QUERY) ((float*)x.dbias)[place] += bias_sum;
    for (int n = 0; x.sums && n < LOOKUPS; n++)
      if (PATTERNS[n] == BY_QUERY && ((void* const*)x.sums)[n]) ((float*)((void* const*)x.sums)[n])[place] += sums[n];
  }
};
