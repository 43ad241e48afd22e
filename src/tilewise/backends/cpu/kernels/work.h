// How a problem is cut: units (a key head of a sequence, with the query heads that share it) and blocks of their queries.
#pragma once
#include "rows.h"

// Under the sanitizer of addresses pieces of an arena are full of NaN at first, and what lies between them may not be touched.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
constexpr long FENCE = 64;
static inline void fence(char* piece, long size, char* end) {
  ASAN_UNPOISON_MEMORY_REGION(piece, size);
  memset(piece, 0xff, size);
  ASAN_POISON_MEMORY_REGION(piece + size, end - piece - size);
}
#else
constexpr long FENCE = 0;
static inline void fence(char*, long, char*) {}
#endif

struct Arena {  // memory that the caller allocated, handed out from its start in whole cache lines
  char* next;
  bool counts = !next;                              // only, from 0, how much is needed
  template <typename T> T* take(long n) {
    char* piece = next;
    next += (n * (long)sizeof(T) + 63) / 64 * 64 + FENCE;
    if (!counts) fence(piece, n * (long)sizeof(T), next);
    return (T*)piece;
  }
};

// What each thread works with, one behind the other.
template <typename Scratch> struct Workers {
  char* first;
  long each;

  Workers(const Problem& x, Arena arena) : first(arena.next) {
    Scratch(x, arena);
    each = arena.next - first;
  }
  Scratch of(const Problem& x, int worker) const {
    Arena arena = {first + worker * each};
    return Scratch(x, arena);
  }
  long end(const Problem& x) const { return (long)first + x.threads * each; }
};

struct Unit { Sequence s; int kv_head; };

static inline Unit unit_of(const Problem& x, long u) {
  const long b = u / x.kv_heads, *order = (const long*)x.order;     // sequences, those with the longest keys first
  return {Sequence(x, (int)(order ? order[b] : b)), (int)(u % x.kv_heads)};
}

static inline int heads_together(const Problem& x) {
  const long group = x.fold ? x.heads / x.kv_heads : 1;
  return (int)(group < x.block_rows ? group : x.block_rows);
}
static inline int queries_together(const Problem& x) { return (int)x.block_rows / heads_together(x); }
static inline int head_blocks(const Problem& x) {
  const int together = heads_together(x);
  return ((int)(x.heads / x.kv_heads) + together - 1) / together;
}
static inline int blocks_of(const Problem& x, int nq) { return (nq + queries_together(x) - 1) / queries_together(x) * head_blocks(x); }

static inline Block block_of(const Problem& x, const Unit& u, int index) {
  const int group = (int)(x.heads / x.kv_heads), together = heads_together(x), per_head = head_blocks(x);
  const int first = index / per_head * queries_together(x), member = index % per_head * together;
  const int heads = group - member < together ? group - member : together;
  const int queries = u.s.nq - first < queries_together(x) ? u.s.nq - first : queries_together(x);
  return {first, u.kv_head * group + member, heads, queries * heads};
}
