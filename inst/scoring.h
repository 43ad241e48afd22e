// From products to finished scores of one query and a panel of keys: score function, bias, mask; and dropout's random bits.
#pragma once
#include "functions.h"
#include "rows.h"

// Entries of the bias, or of its tangent, for one query and the keys of a panel.
static void read_bias(const Problem& x, const Sequence& s, const void* bias, const long* strides, int h, int i, int first, float* to) {
  const void* from = at(bias, (int)x.bias_kind, s.b * strides[0] + h * strides[1] + i * strides[2] + first * strides[3]);
  const int n = s.nk - first < PANEL ? s.nk - first : PANEL;
  read((int)x.bias_kind, from, strides[3], n, to);
  for (int j = n; j < PANEL; j++) to[j] = 0;
}

static inline ivec keys_from(int first, int nk) {  // beyond the sequence the last one, so that no lookup leaves its tensor
  const ivec k = first + iota();
  return k < nk ? k : splat(nk - 1);
}

static inline ivec visible(const Problem& x, const Sequence& s, int h, int i, int first) {
  const ivec there = first + iota() < s.nk;
  return HAS_MASK ? there & mask(x, s.b, h, i, keys_from(first, s.nk), s.nq, s.nk) : there;
}

// Finished scores in the place of scale * q.k; -inf where hidden.
static inline void finish(const Problem& x, const Sequence& s, int h, int i, int panel, bool partial, float* row) {
  if (!HAS_SCORE && !x.bias && !partial) return;
  const int first = panel * PANEL;
  float bias[PANEL];
  if (x.bias) read_bias(x, s, x.bias, x.bias_strides, h, i, first, bias);
  for (int c = 0, n = width(s.keys_of(panel)); c < n; c += LANES) {
    vec y = load(row + c);
    if (HAS_SCORE) y = score(x, y, s.b, h, i, keys_from(first + c, s.nk), s.nq, s.nk);
    if (x.bias) y += load(bias + c);
    if (partial) y = select(visible(x, s, h, i, first + c), y, splat(-INFINITY));
    store(row + c, y);
  }
}

// Philox4x32-10 (`tilewise/rng.py`, which defines it): the 16 random bits of each key of a panel.
static void random_bits(const Problem& x, const Sequence& s, int h, int i, int panel, uint16_t* bits) {
  typedef unsigned words __attribute__((vector_size(32)));          // of the panel's 8 groups of columns
  typedef unsigned long products __attribute__((vector_size(64)));
  const long* rng = (const long*)x.rng;
  const unsigned stream = (unsigned)((rng[2] + s.b) * x.heads + h), row = (unsigned)(i + (x.cached ? s.nk - s.nq : 0));
  words c0, c1 = row - words{}, c2 = stream - words{}, c3 = (unsigned)rng[1] - words{};
  for (int g = 0; g < PANEL / 8; g++) c0[g] = panel * (PANEL / 8) + g;
  unsigned k0 = (unsigned)rng[0], k1 = (unsigned)(rng[0] >> 32);
  for (int round = 0; round < 10; round++) {
    const products p0 = __builtin_convertvector(c0, products) * 0xD2511F53ul, p1 = __builtin_convertvector(c2, products) * 0xCD9E8D57ul;
    c0 = __builtin_convertvector(p1 >> 32, words) ^ c1 ^ k0;
    c2 = __builtin_convertvector(p0 >> 32, words) ^ c3 ^ k1;
    c1 = __builtin_convertvector(p1, words);
    c3 = __builtin_convertvector(p0, words);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  unsigned in_order[PANEL / 2];                                      // [32 columns][word][group], two columns in each
  const words all[4] = {c0, c1, c2, c3};
  for (int g = 0; g < PANEL / 8; g++) for (int w = 0; w < 4; w++) in_order[g / 4 * 16 + 4 * w + g % 4] = all[w][g];
  memcpy(bits, in_order, sizeof in_order);
}

// Zeros in the place of what dropout drops.
static inline void drop(const Problem& x, const uint16_t* bits, float* row) {
  for (int c = 0; c < PANEL; c++) row[c] = bits[c] >= x.dropout ? row[c] : 0.f;
}
