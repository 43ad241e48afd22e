// The new tokens of a step into a cache, copied or turned: `append_look` finds where they go and whether all is right, and writes to no
// cache; `append_write` writes. Of tokens [B, count, H_kv, bytes]; a sequence is a row of `lengths`, of `table` if it has pages.
#include <algorithm>
#include <climits>
#include <cstring>
#include "problem.h"
#include "rows.h"

static inline long sequence_of(const Append& x, long b) { return x.index ? ((const long*)x.index)[b] : b; }

static inline const int* pages_of(const Append& x, long i) { return (const int*)x.table + i * x.table_stride; }

static inline long room_of(const Append& x, long i) {
  if (x.table) return x.room ? ((const long*)x.room)[i] : x.columns * x.rows_each;
  return x.rows_each - (x.padding ? ((const int*)x.padding)[i] : 0);
}

static inline long slot_of(const Append& x, long i) {
  if (!x.slots) return i;
  return x.slots_wide ? ((const long*)x.slots)[i] : ((const int*)x.slots)[i];
}

struct Marks {  // zeroed at each look: of sequences and slots whether they are written to, of pages their owners
  char *sequence, *slot;
  int *owners, *last;
  explicit Marks(const Append& x) {
    owners = (int*)x.scratch;
    last = owners + (x.foreign ? x.slots_there : 0);
    sequence = (char*)(last + (x.foreign ? x.slots_there : 0));
    slot = sequence + x.sequences;
  }
  long end(const Append& x) const { return (long)(slot + (x.table ? 0 : x.slots_there)); }
};

extern "C" long append_memory(const Append* p) {
  Append x = *p;
  x.scratch = nullptr;
  return Marks(x).end(x);
}

// Of pages that the caller manages: those in use exist, once in a sequence, and those written to are nobody else's.
static bool table_is_right(const Append& x, const Marks& marks) {
  const int* lengths = (const int*)x.lengths;
  auto end = [&](long i) { return (lengths[i] + (marks.sequence[i] ? x.count : 0) + x.rows_each - 1) / x.rows_each; };
  for (long i = 0; i < x.sequences; i++) {
    if (lengths[i] < 0 || lengths[i] > room_of(x, i)) return false;
    for (long c = 0; c < end(i); c++) {
      const long page = pages_of(x, i)[c];
      if (page < 0 || page >= x.slots_there || marks.last[page] == i + 1) return false;
      marks.last[page] = (int)(i + 1);
      marks.owners[page]++;
    }
  }
  for (long i = 0; i < x.sequences; i++) {
    if (!marks.sequence[i] || !x.count) continue;
    for (long c = lengths[i] / x.rows_each; c < end(i); c++) if (marks.owners[pages_of(x, i)[c]] > 1) return false;
  }
  return true;
}

// Whether nothing is wrong with lengths, slots, pages and the room for new tokens. Then rows [B][slot, first row, keys
// afterwards], order and the longest and shortest sequence are told; whoever wants to know what is wrong looks again.
extern "C" long append_look(Append* p) {
  Append& x = *p;
  const Marks marks(x);
  memset(x.scratch, 0, marks.end(x) - (long)x.scratch);
  int* rows = (int*)x.rows;
  x.longest = 0, x.shortest = LONG_MAX;
  for (long b = 0; b < x.batch; b++, rows += 3) {
    const long i = sequence_of(x, b);
    if (i < 0 || i >= x.sequences) return 0;
    const long n = ((const int*)x.lengths)[i], slot = x.table ? 0 : slot_of(x, i), room = room_of(x, i);
    const long first = x.table || !x.padding ? 0 : ((const int*)x.padding)[i];
    if (n < 0 || first < 0 || n + x.count > room || (x.cos && n + x.count > x.positions)) return 0;
    if (!x.table && (slot < 0 || slot >= x.slots_there)) return 0;
    if (x.writes) {
      char& mark = x.table ? marks.sequence[i] : marks.slot[slot];
      if (mark) return 0;
      mark = 1;
      const long made = x.held ? ((const long*)x.held)[b] - n : 0;     // room that was made before
      if (x.held && (x.extended ? made < x.count : made > 0)) return 0;
    }
    rows[0] = (int)slot, rows[1] = (int)first, rows[2] = (int)(n + x.count);
    x.longest = std::max(x.longest, n + x.count), x.shortest = std::min(x.shortest, n + x.count);
  }
  if (x.foreign && !table_is_right(x, marks)) return 0;
  if (x.order) {
    long* order = (long*)x.order;
    for (long b = 0; b < x.batch; b++) order[b] = b;
    rows = (int*)x.rows;
    std::stable_sort(order, order + x.batch, [&](long a, long b) { return rows[3 * a + 2] > rows[3 * b + 2]; });
  }
  return 1;
}

struct Element16 { uint16_t bits; };
template <int KIND> struct Element : Element16 {
  operator float() const { return KIND == FP16 ? from_fp16(bits) : from_bf16(bits); }
  void operator=(float x) { bits = KIND == FP16 ? to_fp16(x) : to_bf16(x); }
};

// One row at its position, as `rotary.py` says, to the bit: compiled without contraction (compiler.py).
template <typename T> static void turn(const Append& x, void* to_row, const void* from_row, long position) {
  T* to = (T*)to_row;
  const T* from = (const T*)from_row;
  const float *cos = (const float*)x.cos + position * x.cos_stride, *sin = (const float*)x.sin + position * x.sin_stride;
  for (long i = 0; i < x.pairs; i++) {
    const long first = x.interleaved ? 2 * i : i, second = x.interleaved ? 2 * i + 1 : i + x.pairs;
    const float a = from[first], b = from[second];
    to[first] = a * cos[i] - b * sin[i];
    to[second] = a * sin[i] + b * cos[i];
  }
  memcpy(to + 2 * x.pairs, from + 2 * x.pairs, x.bytes - 2 * x.pairs * sizeof(T));
}

// Heads of one token or query.
static void turn_heads(const Append& x, long heads, char* to, const long* to_strides, const char* from, const long* from_strides,
                       long position) {
  for (long h = 0; h < heads; h++, to += to_strides[2], from += from_strides[2]) {
    if (x.kind == FP32) turn<float>(x, to, from, position);
    else if (x.kind == FP16) turn<Element<FP16>>(x, to, from, position);
    else turn<Element<BF16>>(x, to, from, position);
  }
}

static inline char* row_at(const void* memory, const long* strides, long slot, long row) {
  return (char*)memory + slot * strides[0] + row * strides[1];
}

// One token: its heads, at once where they lie one after another.
static inline void copy(const Append& x, void* to, const long* to_strides, long slot, long row, const void* from,
                        const long* from_strides, long b, long token, long bytes) {
  char *target = row_at(to, to_strides, slot, row), *source = row_at(from, from_strides, b, token);
  const bool together = to_strides[2] == bytes && from_strides[2] == bytes;
  const long size = together ? bytes * x.kv_heads : bytes;
  for (long h = 0; h < (together ? 1 : x.kv_heads); h++)
    memmove(target + h * to_strides[2], source + h * from_strides[2], size);
}

// What a look has found right, for no more queries than the shortest sequence then has keys. `pages` [B][pages_row] are those of
// the sequences in order, `turned` is q at its positions.
extern "C" void append_write(const Append* p) {
  const Append& x = *p;
  const int* rows = (const int*)x.rows;
  for (long b = 0; b < x.batch; b++, rows += 3) {
    const long i = sequence_of(x, b), before = rows[2] - x.count;
    for (long token = 0; token < x.count; token++) {
      long slot = rows[0], row = rows[1] + before + token;
      if (x.table) {
        slot = pages_of(x, i)[row / x.rows_each], row %= x.rows_each;
        if (slot < 0 || slot >= x.slots_there) continue;
      }
      if (x.cos) turn_heads(x, x.kv_heads, row_at(x.k, x.k_strides, slot, row), x.k_strides,
                            row_at(x.k_new, x.k_new_strides, b, token), x.k_new_strides, before + token);
      else copy(x, x.k, x.k_strides, slot, row, x.k_new, x.k_new_strides, b, token, x.bytes);
      if (x.v_new) copy(x, x.v, x.v_strides, slot, row, x.v_new, x.v_new_strides, b, token, x.bytes_v);
    }
    for (long query = 0; query < x.queries; query++)
      turn_heads(x, x.heads, row_at(x.turned, x.turned_strides, b, query), x.turned_strides,
                 row_at(x.q, x.q_strides, b, query), x.q_strides, rows[2] - x.queries + query);
    if (x.count) ((int*)x.lengths)[i] = rows[2];
    if (x.table) memcpy((int*)x.pages + b * x.pages_row, pages_of(x, i), x.pages_row * sizeof(int));
  }
}
