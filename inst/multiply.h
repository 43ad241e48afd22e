// Products of matrices with sums in fp32, blocked for registers: each step takes ROWS words of a and COLUMNS vectors of b.
#pragma once
#include "rows.h"

static inline vec multiplied(vec left, vec right, vec sum) {
#if defined(__AVX512BF16__)
  if (PAIRS) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#endif
  return sum + left * right;
}

// c[MR, NV vectors] (+)= a . b, with n words. a[i, k] is at a[i * lda + k], or at a[k * lda + i] if TRANSPOSED.
template <int MR, int NV, bool TRANSPOSED, bool ADD>
static inline void block(const float* __restrict__ a, long lda, const float* __restrict__ b, long ldb, float* __restrict__ c,
                         long ldc, int n) {
  vec sums[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sums[i][j] = vec{};
  for (int k = 0; k < n; k++) {
    vec right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) right[j] = load(b + k * ldb + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const vec left = splat(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sums[i][j] = multiplied(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      float* to = c + i * ldc + j * LANES;
      store(to, ADD ? load(to) + sums[i][j] : sums[i][j]);  // what is there is added last: errors grow with tiles, not with terms
    }
}

template <int MR, bool TRANSPOSED, bool ADD>
static void columns(const float* a, long lda, const float* b, long ldb, float* c, long ldc, int vectors, int n) {
  for (; vectors >= COLUMNS; vectors -= COLUMNS, b += COLUMNS * LANES, c += COLUMNS * LANES)
    block<MR, COLUMNS, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, n);
  if (COLUMNS == 4 && vectors & 2) block<MR, 2, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, n), b += 2 * LANES, c += 2 * LANES;
  if (vectors & 1) block<MR, 1, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, n);
}

// c[rows, cols] (+)= a . b, with so many terms; cols is a multiple of LANES. lda and ldb count words.
template <bool TRANSPOSED, bool ADD>
static void multiply(const float* a, long lda, const float* b, long ldb, float* c, long ldc, int rows, int cols, int terms) {
  const int n = words(terms);
  const long step = TRANSPOSED ? 1 : lda;
  const int vectors = cols / LANES;
  for (; rows >= ROWS; rows -= ROWS, a += ROWS * step, c += ROWS * ldc)
    columns<ROWS, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, vectors, n);
  if (rows & 4) columns<4, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, vectors, n), a += 4 * step, c += 4 * ldc;
  if (rows & 2) columns<2, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, vectors, n), a += 2 * step, c += 2 * ldc;
  if (rows & 1) columns<1, TRANSPOSED, ADD>(a, lda, b, ldb, c, ldc, vectors, n);
}
