// Products of few queries with keys and values where they lie in memory, in their own dtype: what decoding is bound by is reading
// them once.
#pragma once
#include "multiply.h"
#include "rows.h"

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

// LANES numbers as fp32.
template <int KIND> static inline vec widened(const void* row, int d) {
  if (KIND == FP32) return load((const float*)row + d);
  if (KIND == FP8) {
    bytes raw;
    memcpy(&raw, (const uint8_t*)row + d, sizeof raw);
    const uvec x = __builtin_convertvector(raw, uvec), magnitude = x & 0x7f;
    const uvec tiny = (uvec)(__builtin_convertvector(magnitude, vec) * 0x1p-9f), normal = (magnitude << 20) + (120u << 23);
    const uvec bits = (uvec)select((ivec)(magnitude < 8), (ivec)tiny, (ivec)normal);
    return (vec)(select((ivec)(magnitude == 0x7f), splat(0x7fc00000), (ivec)bits) | (ivec)((x & 0x80) << 24));
  }
  halves raw;
  memcpy(&raw, (const uint16_t*)row + d, sizeof raw);
#if defined(__AVX512F__)
  const uvec x = (uvec)_mm512_cvtepu16_epi32((__m256i)raw);
#else
  const uvec x = __builtin_convertvector(raw, uvec);
#endif
  if (KIND == BF16) return (vec)(x << 16);
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps((__m256i)raw);
#else
  const uvec magnitude = x & 0x7fff, tiny = (uvec)(__builtin_convertvector(magnitude, vec) * 0x1p-24f);
  const ivec normal = (ivec)((magnitude << 13) + (112u << 23)), beyond = (ivec)((magnitude << 13) + (224u << 23));
  const ivec bits = select((ivec)(magnitude < 0x400), (ivec)tiny, select((ivec)(magnitude < 0x7c00), normal, beyond));
  return (vec)(bits | (ivec)((x & 0x8000) << 16));
#endif
}
template <int KIND> static inline vec widened(const void* row, int d, int dim) {  // 0 behind column dim
  if (d + LANES <= dim) return widened<KIND>(row, d);
  const vec part = load_bytes((const char*)row + d * size_of(KIND), (dim - d) * size_of(KIND));
  return widened<KIND>(&part, 0);
}

// With PAIRS: 2 * LANES numbers of a row as words, 0 behind column dim.
static inline vec pairs(const void* row, int d, int dim) {
#if defined(__AVX512BF16__)
  const int n = dim - d;
  return (vec)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : -1u, (const uint16_t*)row + d);
#endif
}

// Sums of LANES vectors, as one vector: each step of `transpose`, its halves added.
static inline vec sums_of(vec* x) {
#pragma GCC unroll 4
  for (int n = LANES / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) x[i] = interleaved<0>(x[i], x[i + n]) + interleaved<LANES / 2>(x[i], x[i + n]);
  return x[0];
}

constexpr int KEYS = LANES / 4;                     // taken together with four queries

// scores[r, j] = q[r] . keys[j] for R queries and n keys, a multiple of KEYS.
template <int KIND, int R> static void scores_of(const float* q, int wide, const void* const* keys, int n, int dim, float* scores,
                                                 long length, const void* const* next, long size) {
  for (int j = 0; j < n; j += KEYS) {
    vec sums[KEYS][R] = {};
    for (int i = 0; i < KEYS; i++) ask_for(next[j + i], size);
    for (int d = 0; d < dim; d += TERMS * LANES) {
      vec of_q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) of_q[r] = load(q + r * wide + d / TERMS);
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; i++) {
        const vec k = PAIRS ? pairs(keys[j + i], d, dim) : widened<KIND>(keys[j + i], d, dim);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[i][r] = multiplied(of_q[r], k, sums[i][r]);
      }
    }
    vec all[LANES] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; i++) all[r * KEYS + i] = sums[i][r];
    const vec total = sums_of(all);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) memcpy(scores + r * length + j, (const float*)&total + r * KEYS, sizeof(float) * KEYS);
  }
}

// out[r] += sum over n keys of p[r, j] * values[j], for R queries and NV vectors from column d. p is of words.
template <int KIND, int R, int NV> static void values_of(const float* p, long length, const void* const* values, int n, int d, int dim,
                                                         float* out, int wide, const void* const* next, long size) {
  vec sums[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++) sums[r][c] = load(out + r * wide + d + c * LANES);
  for (int j = 0; j < n; j += TERMS) {
    if (d == 0) for (int i = 0; i < TERMS; i++) ask_for(next[j + i], size);
    vec v[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; c += TERMS) {
      const int column = d + c * LANES;
      if (!PAIRS) v[c] = widened<KIND>(values[j], column, dim);
      else pairs_of(pairs(values[j], column, dim), j + 1 < n ? pairs(values[j + 1], column, dim) : vec{}, v + c);
    }
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[r][c] = multiplied(splat(p[r * length + j / TERMS]), v[c], sums[r][c]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < NV; c++) store(out + r * wide + d + c * LANES, sums[r][c]);
}

template <int KIND, int R> static void values_of(const float* p, long length, const void* const* values, int n, int dim, float* out,
                                                 int wide, const void* const* next, long size) {
  int d = 0;
  for (; d + 3 * LANES < dim; d += 4 * LANES) values_of<KIND, R, 4>(p, length, values, n, d, dim, out, wide, next, size);
  for (; d < dim; d += TERMS * LANES) values_of<KIND, R, TERMS>(p, length, values, n, d, dim, out, wide, next, size);
}

// The same for any number of queries. next: rows that are read afterwards, of so many bytes.
template <int KIND> static void scores_of(const float* q, int wide, const void* const* keys, int n, int dim, float* scores,
                                          long length, int rows, const void* const* next, long size) {
  for (; rows >= 4; rows -= 4, q += 4 * wide, scores += 4 * length, size = 0)
    scores_of<KIND, 4>(q, wide, keys, n, dim, scores, length, next, size);
  for (; rows; rows--, q += wide, scores += length, size = 0) scores_of<KIND, 1>(q, wide, keys, n, dim, scores, length, next, size);
}
template <int KIND> static void values_of(const float* p, long length, const void* const* values, int n, int dim, float* out, int wide,
                                          int rows, const void* const* next, long size) {
  for (; rows >= 4; rows -= 4, p += 4 * length, out += 4 * wide, size = 0)
    values_of<KIND, 4>(p, length, values, n, dim, out, wide, next, size);
  for (; rows; rows--, p += length, out += wide, size = 0) values_of<KIND, 1>(p, length, values, n, dim, out, wide, next, size);
}
