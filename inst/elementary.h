// Functions of score and mask graphs (`trace/emit_cpp.py`), of one value or of a vector of them.
#pragma once
#include "rows.h"

#define OF_EACH_LANE(name, expression)                          \
  static inline float name(float x) { return expression; }      \
  static inline vec name(vec of) {                              \
    vec all;                                                    \
    for (int lane = 0; lane < LANES; lane++) {                  \
      const float x = of[lane];                                 \
      all[lane] = expression;                                   \
    }                                                           \
    return all;                                                 \
  }
OF_EACH_LANE(of_log, logf(x))
OF_EACH_LANE(of_log2, log2f(x))
OF_EACH_LANE(of_sqrt, sqrtf(x))
OF_EACH_LANE(of_rsqrt, 1.f / sqrtf(x))
OF_EACH_LANE(of_sin, sinf(x))
OF_EACH_LANE(of_cos, cosf(x))
OF_EACH_LANE(of_erf, erff(x))
OF_EACH_LANE(of_floor, floorf(x))
OF_EACH_LANE(of_ceil, ceilf(x))
OF_EACH_LANE(rounded_to_fp16, from_fp16(to_fp16(x)))
OF_EACH_LANE(rounded_to_bf16, from_bf16(to_bf16(x)))

static inline float power(float a, float b) { return powf(a, b); }
static inline vec power(vec a, vec b) { for (int i = 0; i < LANES; i++) a[i] = powf(a[i], b[i]); return a; }

static inline float of_exp2(float x) { return exp2f(x); }
static inline vec of_exp2(vec x) { return exp2_of(x > 200.f ? splat(200.f) : x); }
static inline float of_exp(float x) { return expf(x); }
static inline vec of_exp(vec x) { return of_exp2(x * LOG2E); }
template <typename T> static inline T of_sigmoid(T x) { return 1.f / (1.f + of_exp(-x)); }

// To fp32 rounding: the series near 0, where the quotient of exponentials cancels.
static inline float of_tanh(float x) { return tanhf(x); }
static inline vec of_tanh(vec x) {
  const vec a = x < 0.f ? -x : x, e = exp2_of(a * (-2 * LOG2E)), y = a * a;
  const vec series = a * (1.f + y * (-0.33333333f + y * (0.13333333f + y * (-0.05396825f + y * (0.021869488f - y * 0.0088632355f)))));
  const vec magnitude = a < 0.3f ? series : (1.f - e) / (1.f + e);
  return x < 0.f ? -magnitude : magnitude;
}

static inline bool select(bool c, bool a, bool b) { return c ? a : b; }
static inline int select(bool c, int a, int b) { return c ? a : b; }
static inline long select(bool c, long a, long b) { return c ? a : b; }
static inline float select(bool c, float a, float b) { return c ? a : b; }

template <typename T> static inline T minimum(T a, T b) { return a < b ? a : b; }
template <typename T> static inline T maximum(T a, T b) { return a > b ? a : b; }
// NaN where one is NaN, as in torch
static inline float minimum(float a, float b) { return (a < b || a != a) ? a : b; }
static inline float maximum(float a, float b) { return (a > b || a != a) ? a : b; }
static inline vec minimum(vec a, vec b) { return ((a < b) | (a != a)) ? a : b; }
static inline vec maximum(vec a, vec b) { return ((a > b) | (a != a)) ? a : b; }
template <typename T> static inline T absolute(T a) { return a < T{} ? -a : a; }

// Whole numbers, rounded down as in Python; a divisor of 0, which a lane that is not selected may have, gives 0.
template <typename T> static inline T floor_of(T a, T b) {
  if (b == 0) return 0;
  if (b == -1) return (T)(0 - (unsigned long)a);
  const T quotient = a / b;
  return quotient * b != a && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}
static inline int floor_divide(int a, int b) { return floor_of(a, b); }
static inline long floor_divide(long a, long b) { return floor_of(a, b); }
static inline float floor_divide(float a, float b) { return floorf(a / b); }
static inline vec floor_divide(vec a, vec b) { return of_floor(a / b); }
template <typename T> static inline T floor_divide(T a, T b) { for (int i = 0; i < LANES; i++) a[i] = floor_of(a[i], b[i]); return a; }
template <typename T> static inline T floor_remainder(T a, T b) { return a - floor_divide(a, b) * b; }

// Conversions. A comparison of vectors of 64-bit numbers is narrowed to the ivec that other booleans are.
static inline int to_int(float x) { return (int)x; }
static inline int to_int(bool x) { return x; }
static inline int to_int(long x) { return (int)x; }
static inline ivec to_int(vec x) { return __builtin_convertvector(x, ivec); }
static inline ivec to_int(ivec boolean) { return boolean & 1; }
static inline float to_float(int x) { return (float)x; }
static inline float to_float(long x) { return (float)x; }
static inline vec to_float(ivec x) { return __builtin_convertvector(x, vec); }
static inline vec to_float(lvec x) { return __builtin_convertvector(x, vec); }
static inline bool truth(bool x) { return x; }
static inline ivec truth(ivec x) { return x; }
static inline ivec truth(lvec x) { return shortened(x); }
static inline long lengthened(int x) { return x; }

// How the gradient of a captured tensor is summed (terms.h).
enum Pattern { BY_ENTRY, BY_KEY, BY_QUERY, DIAGONAL, ANY };

// Entries of a captured tensor.
template <typename T> struct Loaded { typedef int type; };
template <> struct Loaded<long> { typedef long type; };
template <> struct Loaded<float> { typedef float type; };
template <> struct Loaded<double> { typedef float type; };
template <> struct Loaded<bool> { typedef bool type; };
struct Float16 { uint16_t bits; operator float() const { return from_fp16(bits); } };
struct Bfloat16 { uint16_t bits; operator float() const { return from_bf16(bits); } };
template <> struct Loaded<Float16> { typedef float type; };
template <> struct Loaded<Bfloat16> { typedef float type; };
template <typename T> struct Vector;
template <> struct Vector<int> { typedef ivec type; };
template <> struct Vector<bool> { typedef ivec type; };
template <> struct Vector<long> { typedef lvec type; };
template <> struct Vector<float> { typedef vec type; };

template <typename T> static inline typename Loaded<T>::type entry(const void* table, long place) {
  return (typename Loaded<T>::type)((const T*)table)[place];
}
template <typename T> static inline typename Vector<typename Loaded<T>::type>::type entry(const void* table, lvec place) {
  typedef typename Loaded<T>::type One;
  const T* x = (const T*)table;
  const lvec apart = place - place[0] - lengthened(iota());
  long elsewhere = 0;
  for (int i = 0; i < LANES; i++) elsewhere |= apart[i];
  typename Vector<One>::type all;
  if (elsewhere == 0) for (int i = 0; i < LANES; i++) all[i] = (One)x[place[0] + i];
  else for (int i = 0; i < LANES; i++) all[i] = (One)x[place[i]];
  return sizeof(One) == 1 ? -all : all;             // true is -1 in a vector
}
