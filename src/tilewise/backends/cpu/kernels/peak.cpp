// What one core computes at most: sums that stay in registers, enough of them that none waits for another. Each function does n
// steps of SUMS vectors.
#include "vector.h"

#if defined(__aarch64__)
constexpr int SUMS = 24;  // up to four units, and 32 registers
#else
constexpr int SUMS = 12;
#endif

template <typename Step> static float repeated(long n, const Step& step) {
  vec sums[SUMS];
  for (int i = 0; i < SUMS; i++) sums[i] = splat(0.1f * i);
  for (; n > 0; n--) {
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; i++) sums[i] = step(sums[i]);
  }
  vec all = vec{};
  for (int i = 0; i < SUMS; i++) all += sums[i];
  return sum(all);
}

static vec unknown(float x) {  // to the compiler
  volatile float hidden = x;
  return splat((float)hidden);
}

extern "C" {
long peak_memory() { return 0; }
long peak_width() { return SUMS * LANES; }

// Multiplied and added.
float peak_products(long n) {
  const vec factor = unknown(0.5f), term = unknown(0.25f);
  return repeated(n, [=](vec x) { return x * factor + term; });
}

// The same of 16-bit numbers: two pairs to a lane where the CPU has instructions for it.
float peak_pairs(long n) {
#if defined(__AVX512BF16__)
  const __m512bh left = (__m512bh)unknown(0.5f), right = (__m512bh)unknown(0.25f);
  return repeated(n, [=](vec x) { return (vec)_mm512_dpbf16_ps((__m512)x, left, right); });
#else
  return peak_products(n);
#endif
}
long peak_pairs_width() {
#if defined(__AVX512BF16__)
  return 2 * SUMS * LANES;
#else
  return SUMS * LANES;
#endif
}

float peak_exponentials(long n) {
  return repeated(n, [](vec x) { return exp2_of(-x); });
}
}
