// Team: threads that run one function together.
//
// A round is one pass over work that is divided into numbered tickets. Each thread first draws the tickets of
// its own share, neighbours whose numbers are the same in each round, so that data it prefetched is in its
// caches. Then it draws from the shares of other threads, so a thread that the system suspends delays the
// team by one ticket, not by its share.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MAX_THREADS 256
// Polls of a barrier before a thread sleeps: a tenth of a millisecond. Most waits end sooner; a longer one
// means that another process has the core of a thread, and a core that sleeps may take that process over.
#define SPINS 5000

typedef void (*WorkFunction)(void *context, int thread);

// The team of the process. `generation` counts rounds, `arrived` threads at the barrier of this round.
typedef struct {
  pthread_mutex_t one_at_a_time, sleeping;
  pthread_cond_t wake;
  pthread_t thread[MAX_THREADS];
  int threads;
  int64_t epoch;  // counts the calls of team_run; negative ends the threads
  WorkFunction work;
  void *context;
  struct {
    _Alignas(64) atomic_long drawn;
  } share[MAX_THREADS];  // number of tickets drawn from each thread's share in this round
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_uint generation;
  atomic_int asleep;  // threads that sleep until `generation` changes, or are about to
} Team;

// Defined in team.c.
extern Team team;

// Lets the core's other hardware thread run.
static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Sleeps while *word is `value`; may return sooner. wake_all wakes all threads that sleep on `word`.
#ifdef __linux__
static inline void sleep_while_equal(atomic_uint *word, unsigned value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static inline void wake_all(atomic_uint *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}
#else
static inline void sleep_while_equal(atomic_uint *word, unsigned value) {
  if (atomic_load(word) == value) sched_yield();
}

static inline void wake_all(atomic_uint *word) { (void)word; }
#endif

// Marks every ticket as not drawn.
static void team_reset_tickets(void) {
  for (int i = 0; i < team.threads; i++) atomic_store_explicit(&team.share[i].drawn, 0, memory_order_relaxed);
}

// Ends a round: waits until every thread has called it.
static void team_barrier(void) {
  unsigned generation = atomic_load(&team.generation);
  if (atomic_fetch_add(&team.arrived, 1) + 1 == team.threads) {
    atomic_store(&team.arrived, 0);
    team_reset_tickets();
    atomic_store(&team.generation, generation + 1);
    if (atomic_load(&team.asleep)) wake_all(&team.generation);
    return;
  }
  for (long spins = 0; spins < SPINS; spins++) {
    if (atomic_load(&team.generation) != generation) return;
    pause_briefly();
  }
  atomic_fetch_add(&team.asleep, 1);
  while (atomic_load(&team.generation) == generation) sleep_while_equal(&team.generation, generation);
  atomic_fetch_sub(&team.asleep, 1);
}

// The place of one thread in a round.
typedef struct {
  int thread;
  int exhausted;  // number of threads, from itself on, whose shares are drawn completely
} TicketCursor;

// The first ticket of a thread's share of `count` tickets.
static inline long team_share_start(int thread, long count) { return count * thread / team.threads; }

// The next of `count` tickets; after the last, -1 once every thread has finished its tickets.
static inline long team_next_ticket(TicketCursor *cursor, long count) {
  for (; cursor->exhausted < team.threads; cursor->exhausted++) {
    int owner = (cursor->thread + cursor->exhausted) % team.threads;
    long first = team_share_start(owner, count), left = team_share_start(owner + 1, count) - first;
    long drawn = atomic_fetch_add_explicit(&team.share[owner].drawn, 1, memory_order_relaxed);
    if (drawn < left) return first + drawn;
  }
  cursor->exhausted = 0;
  team_barrier();
  return -1;
}

// Runs `work` on every thread of the team, the caller included; returns when all have finished. Calls are
// serialized.
void team_run(WorkFunction work, void *context);
