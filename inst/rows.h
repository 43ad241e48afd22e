// Rows of tensors in memory, of any dtype and with any strides: where they lie, and how they become fp32 tiles and go back.
#pragma once
#include "problem.h"
#include "vector.h"

constexpr int PANEL = 64;                           // keys that are visited together
enum Kind { FP32, FP16, BF16, FP64, FP8 };          // as `launch.KINDS` numbers dtypes

// Products take 32-bit words, each one term in fp32, or two in bf16 where all is bf16 and the CPU multiplies pairs.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = PAIRED;
#else
constexpr bool PAIRS = false;
#endif
constexpr int TERMS = PAIRS ? 2 : 1;                // of a word

static inline int words(long terms) { return (int)(terms + TERMS - 1) / TERMS; }
static inline int width(long dim) { return (int)(dim + TERMS * LANES - 1) / (TERMS * LANES) * (TERMS * LANES); }  // of a row in a tile

static inline long size_of(int kind) { return kind == FP64 ? 8 : kind == FP32 ? 4 : kind == FP8 ? 1 : 2; }

static inline float from_bf16(uint16_t x) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }

static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
}

// Below the smallest normal number of fp16 or fp8 by arithmetic: fp32 numbers so small may be flushed to 0.
static inline float from_fp16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fff, exponent = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;
  const float tiny = magnitude * 0x1p-24f;
  uint32_t bits;
  memcpy(&bits, &tiny, 4);
  bits = (magnitude < 0x400 ? bits : (magnitude << 13) + exponent) | (uint32_t)(x & 0x8000) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

static inline uint16_t to_fp16(float x) {
  const float a = x < 0 ? -x : x, shifted = a + 0.5f;
  uint32_t bits, small, sign;
  memcpy(&bits, &a, 4), memcpy(&small, &shifted, 4), memcpy(&sign, &x, 4);
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13, tiny = small - 0x3f000000;
  const uint32_t magnitude = x != x ? 0x7e00 : a >= 65520.f ? 0x7c00 : a < 0x1p-14f ? tiny : normal;
  return (uint16_t)(magnitude | (sign >> 16 & 0x8000));
}

static inline float from_fp8(uint8_t x) {           // e4m3 without infinities
  const uint32_t magnitude = x & 0x7f;
  const float tiny = magnitude * 0x1p-9f;
  uint32_t bits;
  memcpy(&bits, &tiny, 4);
  bits = (magnitude < 8 ? bits : magnitude == 0x7f ? 0x7fc00000 : (magnitude << 20) + (120u << 23)) | (uint32_t)(x & 0x80) << 24;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

template <typename T, typename Widen> static inline void widened(const void* from, long stride, int n, float* to, Widen widen) {
  const T* x = (const T*)from;
  if (stride == 1) for (int i = 0; i < n; i++) to[i] = widen(x[i]);
  else for (int i = 0; i < n; i++) to[i] = widen(x[i * stride]);
}

// n numbers, `stride` elements apart, as fp32.
static void read(int kind, const void* from, long stride, int n, float* to) {
  switch (kind) {
    case FP32: return widened<float>(from, stride, n, to, [](float x) { return x; });
    case FP16: return widened<uint16_t>(from, stride, n, to, from_fp16);
    case BF16: return widened<uint16_t>(from, stride, n, to, from_bf16);
    case FP64: return widened<double>(from, stride, n, to, [](double x) { return (float)x; });
    case FP8: return widened<uint8_t>(from, stride, n, to, from_fp8);
  }
}

// Writes n numbers, multiplied by a factor.
static void write(int kind, void* to, const float* from, int n, float factor) {
  if (kind == FP32) for (int i = 0; i < n; i++) ((float*)to)[i] = from[i] * factor;
  else if (kind == FP16) for (int i = 0; i < n; i++) ((uint16_t*)to)[i] = to_fp16(from[i] * factor);
  else if (kind == BF16) for (int i = 0; i < n; i++) ((uint16_t*)to)[i] = to_bf16(from[i] * factor);
  else for (int i = 0; i < n; i++) ((double*)to)[i] = from[i] * factor;
}

static inline const void* at(const void* x, int kind, long element) { return (const char*)x + element * size_of(kind); }
static inline void* at(void* x, int kind, long element) { return (char*)x + element * size_of(kind); }

// One sequence: where its rows lie in q, and in k and v.
struct Sequence {
  int b, nq, nk;
  long q_slot, q_start, k_slot, k_start;
  const int* pages;

  Sequence(const Problem& x, int b) : b(b) {
    const int *of_q = (const int*)x.q_rows + 3 * b, *of_k = (const int*)x.k_rows + 3 * b;
    q_slot = x.q_rows ? of_q[0] : b, q_start = x.q_rows ? of_q[1] : 0, nq = x.q_rows ? of_q[2] : (int)x.nq;
    k_slot = x.k_rows ? of_k[0] : b, k_start = x.k_rows ? of_k[1] : 0, nk = x.k_rows ? of_k[2] : (int)x.nk;
    pages = x.pages ? (const int*)x.pages + b * x.pages_row : nullptr;
  }
  // The element of a tensor at which a row of a query head, or of a key head, begins.
  long of_query(const long* strides, int h, int i) const { return q_slot * strides[0] + h * strides[1] + (q_start + i) * strides[2]; }
  long of_key(const Problem& x, const long* strides, int h, int j) const {
    if (!pages) return k_slot * strides[0] + h * strides[1] + (k_start + j) * strides[2];
    return pages[j / x.page_size] * strides[0] + h * strides[1] + j % x.page_size * strides[2];
  }
  long of_statistics(const Problem& x, int h, int i) const { return (q_slot * x.heads + h) * x.lse_rows + q_start + i; }
  // How many keys n panels have: only a sequence's last one may have fewer than PANEL.
  int keys_of(int panel, int n = 1) const { return nk - panel * PANEL < n * PANEL ? nk - panel * PANEL : n * PANEL; }
};

// The queries of a block: neighbouring ones, for each of them neighbouring heads of one group.
struct Block {
  int first, head, heads, rows;
  int query(int row) const { return heads == 1 ? first + row : first + row / heads; }     // divisions take their time
  int head_of(int row) const { return heads == 1 ? head : head + row % heads; }
};

constexpr int AHEAD = 8;                            // rows
// Rows lie apart, so that no hardware foresees the next one: what is read later is asked for while something else is computed.
static inline void ask_for(const void* row, long size) {
  for (long at = 0; at < size; at += 64) __builtin_prefetch((const char*)row + at, 0, 2);
}

// A row of words [width] from one in memory, 0 behind column dim, times a factor without PAIRS.
static inline void read_words(int kind, const void* from, int dim, int width, float factor, float* to) {
  if (PAIRS) {
    memcpy(to, from, sizeof(uint16_t) * dim);
    memset((uint16_t*)to + dim, 0, sizeof(uint16_t) * (width - dim));
    return;
  }
  read(kind, from, 1, dim, to);
  if (factor != 1) for (int d = 0; d < dim; d++) to[d] *= factor;
  if (dim < width) memset(to + dim, 0, sizeof(float) * (width - dim));
}

// Keys or values first .. first + n - 1 of a head as rows of words [n, width], 0 behind column dim; hidden ones are 0, since
// padding may hold NaN. scales: of each head, of those stored in fp8.
static void read_keys(const Problem& x, const Sequence& s, const void* from, const void* scales, const long* strides, int h,
                      int first, int n, int dim, int width, const bool* hidden, float* to) {
  const int kind = (int)x.k_kind;
  for (int j = 0; j < n; j++, to += width) {
    if (first + j + AHEAD < s.nk) ask_for(at(from, kind, s.of_key(x, strides, h, first + j + AHEAD)), dim * size_of(kind));
    if (!(hidden && hidden[j]))
      read_words(kind, at(from, kind, s.of_key(x, strides, h, first + j)), dim, width, scales ? ((const float*)scales)[h] : 1, to);
    else
      memset(to, 0, sizeof(float) * width);
  }
}

// A panel [dim, PANEL] from n rows [n, width]; n and width are multiples of LANES.
static void transposed(const float* from, int n, int dim, int width, float* to) {
  for (int d = 0; d < dim; d += LANES)
    for (int j = 0; j < n; j += LANES) {
      vec x[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load(from + (j + i) * (long)width + d);
      transpose(x);
      for (int i = 0; i < LANES && d + i < dim; i++) store(to + (d + i) * (long)PANEL + j, x[i]);
    }
}

// A row as words, in its place: neighbouring numbers are paired. n is a multiple of TERMS * LANES.
static inline void pair_columns(float* row, int n) {
#if defined(__AVX512BF16__)
  for (int c = 0; PAIRS && c < n; c += 2 * LANES) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)load(row + c + LANES), (__m512)load(row + c));
    memcpy(row + c / 2, &pairs, sizeof pairs);
  }
#endif
}

// 2 * LANES numbers of two rows as words that have one of each.
static inline void pairs_of(vec first, vec second, vec* to) {
#if defined(__AVX512BF16__)
  typedef short indices __attribute__((vector_size(64)));
  const indices low = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  to[0] = (vec)_mm512_permutex2var_epi16((__m512i)first, (__m512i)low, (__m512i)second);
  to[1] = (vec)_mm512_permutex2var_epi16((__m512i)first, (__m512i)(low + 16), (__m512i)second);
#endif
}

// Two rows of n numbers in words as one of which each word has a number of both.
static inline void pair_rows(const float* first, const float* second, int n, float* to) {
  for (int c = 0; PAIRS && c < n; c += 2 * LANES) {
    vec pairs[2];
    pairs_of(load(first + c / 2), load(second + c / 2), pairs);
    store(to + c, pairs[0]), store(to + c + LANES, pairs[1]);
  }
}

// Rows of words, `from_length` apart, as pairs of rows. An odd last row is paired with zeros.
static void pair_all_rows(const float* from, long from_length, int rows, int n, float* to, long to_length) {
  const float zeros[1024] = {};
  for (int r = 0; r < rows; r += 2)
    pair_rows(from + r * from_length, r + 1 < rows ? from + (r + 1) * from_length : zeros, n, to + r / 2 * to_length);
}
