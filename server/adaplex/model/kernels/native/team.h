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

#define MAX_THREADS 256
// Polls of a barrier before a thread yields its core: about half a millisecond. Not fewer, since a process
// that gets the core by sched_yield runs for milliseconds, and most waits end within microseconds.
#define SPINS 30000

typedef void (*WorkFunction)(void *context, int thread);

// The team of the process. `generation` counts rounds, `arrived` threads at the barrier of this round.
static struct {
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
} team = {.one_at_a_time = PTHREAD_MUTEX_INITIALIZER,
          .sleeping = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .threads = 1};

// Lets the core's other hardware thread run.
static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

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
    return;
  }
  for (long spins = 0; atomic_load(&team.generation) == generation; spins++) {
    if (spins < SPINS)
      pause_briefly();
    else
      sched_yield();
  }
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

// If the team has a thread for each core, pins the calling thread to core number `member`: otherwise the
// system sometimes runs two threads on one core, which then wait for each other. True if pinned; `before`
// gets the previous affinity.
static int team_pin_to_core(int member, cpu_set_t *before) {
  cpu_set_t one;
  if (sched_getaffinity(0, sizeof *before, before) || CPU_COUNT(before) != team.threads) return 0;
  for (int cpu = 0, passed = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, before) || passed++ != member) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return !sched_setaffinity(0, sizeof one, &one);
  }
  return 0;
}

// Main function of a thread of the team, whose number is `number`: waits for calls of team_run.
static void *team_thread(void *number) {
  int me = (int)(intptr_t)number;
  int64_t seen = 0;
  cpu_set_t before;
  for (int placed = 0;; placed = 1) {
    pthread_mutex_lock(&team.sleeping);
    while (team.epoch == seen) pthread_cond_wait(&team.wake, &team.sleeping);
    seen = team.epoch;
    pthread_mutex_unlock(&team.sleeping);
    if (seen < 0) return NULL;
    if (!placed) team_pin_to_core(me, &before);  // only now is team.threads final
    team.work(team.context, me);
    team_barrier();
  }
}

// Runs `work` on every thread of the team, the caller included; returns when all have finished. Calls are
// serialized.
static void team_run(WorkFunction work, void *context) {
  pthread_mutex_lock(&team.one_at_a_time);
  team_reset_tickets();
  if (team.threads > 1) {
    pthread_mutex_lock(&team.sleeping);
    team.work = work;
    team.context = context;
    team.epoch++;
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.sleeping);
  }
  cpu_set_t before;
  int took = team.threads > 1 && team_pin_to_core(0, &before);
  work(context, 0);
  team_barrier();
  if (took) sched_setaffinity(0, sizeof before, &before);
  pthread_mutex_unlock(&team.one_at_a_time);
}

// Ends every thread of the team but the caller.
static void team_stop(void) {
  pthread_mutex_lock(&team.sleeping);
  team.epoch = -1;
  pthread_cond_broadcast(&team.wake);
  pthread_mutex_unlock(&team.sleeping);
  for (int i = 1; i < team.threads; i++) pthread_join(team.thread[i], NULL);
  team.threads = 1;
  team.epoch = 0;
}

// Resizes the team to `threads`, including the caller of team_run; returns its size, smaller if the system
// refuses a thread.
int team_resize(int threads) {
  pthread_mutex_lock(&team.one_at_a_time);
  team_stop();
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  for (; team.threads < threads; team.threads++) {
    intptr_t number = team.threads;
    if (pthread_create(&team.thread[number], NULL, team_thread, (void *)number)) break;
  }
  int strong = team.threads;
  pthread_mutex_unlock(&team.one_at_a_time);
  return strong;
}
