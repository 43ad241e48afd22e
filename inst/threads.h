// Work shared among the threads of PyTorch's own OpenMP runtime, whose entry point the caller passes: no second pool of threads
// that would compete with it, and nothing to link.
#pragma once
#include "problem.h"

// Tasks 0 .. count - 1, each taken by the thread that is free first.
struct Tasks {
  long* next;
  long count;
  bool take(long& task) const { return (task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count; }
};

// Runs body(worker, tasks) on every thread; each has to take tasks until there are none.
template <typename Body> static void in_parallel(const Problem& x, long count, const Body& body) {
  struct Team { const Body* body; long next, count; int workers; } team = {&body, 0, count, 0};
  const auto enter = [](void* data) {
    Team* team = (Team*)data;
    (*team->body)(__atomic_fetch_add(&team->workers, 1, __ATOMIC_RELAXED), Tasks{&team->next, team->count});
  };
  typedef void (*Entry)(void (*)(void*), void*, unsigned, unsigned);
  const long threads = count < x.threads ? count : x.threads;
  if (threads > 1) ((Entry)x.parallel)(enter, &team, (unsigned)threads, 0);
  else enter(&team);
}
