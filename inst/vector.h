// Vectors of the machine's width, by the vector extensions that GCC and Clang share, and what is computed with them.
// A vector of booleans is an ivec of 0 and -1.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;    // a product's accumulators: ROWS x COLUMNS vectors
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, COLUMNS = 2;
#else
constexpr int LANES = 4, ROWS = 6, COLUMNS = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int ivec __attribute__((vector_size(4 * LANES)));
typedef unsigned uvec __attribute__((vector_size(4 * LANES)));
typedef long lvec __attribute__((vector_size(8 * LANES)));

static inline vec splat(float x) { return x - vec{}; }
static inline ivec splat(int x) { return x - ivec{}; }
static inline lvec splat(long x) { return x - lvec{}; }
static inline ivec splat(bool x) { return splat(x ? -1 : 0); }
static inline lvec lengthened(ivec x) { return __builtin_convertvector(x, lvec); }
static inline ivec shortened(lvec x) { return __builtin_convertvector(x, ivec); }

static inline vec load(const float* p) { vec x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
// The first n bytes of a vector, fewer than it has, and 0: without a call, for which loops would keep their sums in memory.
static inline vec load_bytes(const void* p, long n) {
#if defined(__AVX512BW__)
  return (vec)_mm512_maskz_loadu_epi8((1ul << n) - 1, p);
#else
  vec x = {};
  memcpy(&x, p, n);
  return x;
#endif
}

static inline ivec iota() { ivec x; for (int i = 0; i < LANES; i++) x[i] = i; return x; }
static inline vec select(ivec c, vec a, vec b) { return c ? a : b; }
static inline ivec select(ivec c, ivec a, ivec b) { return c ? a : b; }
static inline lvec select(ivec c, lvec a, lvec b) { return lengthened(c) ? a : b; }

static inline float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
#endif
}
// The larger; b where either is NaN.
static inline vec maximum_or_second(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline float largest(vec x) {  // of numbers
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
#endif
}

// 2^x for x <= 200: 0 for -inf, NaN for NaN.
static inline vec exp2_of(vec x) {
  x = maximum_or_second(splat(-200.f), x);
#if defined(__AVX512F__)
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, 0);
#else
  const vec magic = splat(12582912.f), n = (x + magic) - magic;  // rounds to an integer
#endif
  const vec f = x - n;
  vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const ivec e = __builtin_convertvector(select(n == n, n, vec{}), ivec), half = e >> 1;  // in two steps, so that none overflows
  return p * (vec)((half + 127) << 23) * (vec)((e - half + 127) << 23);
#endif
}
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static inline vec exp_of(vec x) { return exp2_of(x * LOG2E); }

// Transposes LANES rows of LANES columns: log2(LANES) times, row i is interleaved with row i + LANES / 2.
#if defined(__clang__) || __GNUC__ >= 12
template <int... I> struct Indices {};
template <int N, int... I> struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I> struct Upto<0, I...> { typedef Indices<I...> type; };
template <int FIRST, int... I> static inline vec interleaved(vec a, vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * LANES)...);
}
template <int FIRST> static inline vec interleaved(vec a, vec b) { return interleaved<FIRST>(a, b, typename Upto<LANES>::type()); }
#else
template <int FIRST> static inline vec interleaved(vec a, vec b) {
  ivec places;
  for (int i = 0; i < LANES; i++) places[i] = FIRST + i / 2 + i % 2 * LANES;
  return __builtin_shuffle(a, b, places);
}
#endif
static inline void transpose(vec* x) {
  vec y[LANES];
#pragma GCC unroll 4
  for (int n = 1; n < LANES; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = interleaved<0>(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = interleaved<LANES / 2>(x[i], x[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}
