// The new tokens of a step into a cache, by copies: `append_look` finds where they go and whether all is right, and writes to no
// cache; `append_write` writes. Of tokens [B, count, H_kv, bytes]; a sequence is a row of `lengths`, of `table` if it has pages.
#include <algorithm>
#include <climits>
#include <cstring>
#include "problem.h"

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
    if (n < 0 || first < 0 || n + x.count > room) return 0;
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

// One token: its heads, at once where they lie one after another.
static inline void copy(const Append& x, void* to, const long* to_strides, long slot, long row, const void* from,
                        const long* from_strides, long b, long token, long bytes) {
  char* target = (char*)to + slot * to_strides[0] + row * to_strides[1];
  const char* source = (const char*)from + b * from_strides[0] + token * from_strides[1];
  const bool together = to_strides[2] == bytes && from_strides[2] == bytes;
  const long size = together ? bytes * x.kv_heads : bytes;
  for (long h = 0; h < (together ? 1 : x.kv_heads); h++)
    memmove(target + h * to_strides[2], source + h * from_strides[2], size);
}

// What a look has found right. `pages` [B][pages_row] are those of the sequences in order.
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
      copy(x, x.k, x.k_strides, slot, row, x.k_new, x.k_new_strides, b, token, x.bytes);
      if (x.v_new) copy(x, x.v, x.v_strides, slot, row, x.v_new, x.v_new_strides, b, token, x.bytes_v);
    }
    if (x.count) ((int*)x.lengths)[i] = rows[2];
    if (x.table) memcpy((int*)x.pages + b * x.pages_row, pages_of(x, i), x.pages_row * sizeof(int));
  }
}
