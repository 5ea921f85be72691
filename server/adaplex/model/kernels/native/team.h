// Team: threads that run one function together, and share its work by tickets.
//
// A thread takes a share of neighbouring tickets first, the same of each round, so that it finds in its
// caches what it asked memory for. Whoever has done its own takes from the others, so a thread that the
// system holds up delays them by one ticket, not by its share.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_THREADS 256
// About half a millisecond; then the core goes to whoever else wants it. Not sooner: who gets a core by
// sched_yield keeps it for milliseconds, and most waits are over in microseconds.
#define SPINS 30000

typedef void (*Work)(void *context, int thread);

static struct {
  pthread_mutex_t one_at_a_time, sleeping;
  pthread_cond_t wake;
  pthread_t thread[MAX_THREADS];
  int threads;
  int64_t epoch;  // counts the calls of team_run; negative ends the threads
  Work work;
  void *context;
  struct {
    _Alignas(64) atomic_long drawn;
  } share[MAX_THREADS];  // tickets drawn of each thread's share, in this round
  _Alignas(64) atomic_int arrived;
  _Alignas(64) atomic_uint generation;
} team = {.one_at_a_time = PTHREAD_MUTEX_INITIALIZER,
          .sleeping = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .threads = 1};

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

static void team_start_round(void) {
  for (int i = 0; i < team.threads; i++)
    atomic_store_explicit(&team.share[i].drawn, 0, memory_order_relaxed);
}

// Ends a round: waits until all threads are there.
static void team_barrier(void) {
  unsigned generation = atomic_load(&team.generation);
  if (atomic_fetch_add(&team.arrived, 1) + 1 == team.threads) {
    atomic_store(&team.arrived, 0);
    team_start_round();
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

typedef struct {
  int thread;
  int helped;  // threads whose shares are all drawn, itself first
} Draw;

// The first of the share of a thread in so many tickets.
static inline long team_share(int thread, long count) { return count * thread / team.threads; }

// The next of `count` tickets, or -1 after the last, when all threads have done theirs.
static inline long team_next(Draw *draw, long count) {
  for (; draw->helped < team.threads; draw->helped++) {
    int whose = (draw->thread + draw->helped) % team.threads;
    long first = team_share(whose, count), left = team_share(whose + 1, count) - first;
    long drawn = atomic_fetch_add_explicit(&team.share[whose].drawn, 1, memory_order_relaxed);
    if (drawn < left) return first + drawn;
  }
  draw->helped = 0;
  team_barrier();
  return -1;
}

// With a thread for each core, keeps each member on a core of its own: the system would at times run
// two on one, which then wait for each other. Returns whether it did; `before` is where it was.
static int team_take_core(int member, cpu_set_t *before) {
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

static void *team_member(void *number) {
  int me = (int)(intptr_t)number;
  int64_t seen = 0;
  cpu_set_t before;
  for (int placed = 0;; placed = 1) {
    pthread_mutex_lock(&team.sleeping);
    while (team.epoch == seen) pthread_cond_wait(&team.wake, &team.sleeping);
    seen = team.epoch;
    pthread_mutex_unlock(&team.sleeping);
    if (seen < 0) return NULL;
    if (!placed) team_take_core(me, &before);  // the team is complete now
    team.work(team.context, me);
    team_barrier();
  }
}

// Runs `work` on every thread of the team; returns when all are done. One call at a time.
static void team_run(Work work, void *context) {
  pthread_mutex_lock(&team.one_at_a_time);
  team_start_round();
  if (team.threads > 1) {
    pthread_mutex_lock(&team.sleeping);
    team.work = work;
    team.context = context;
    team.epoch++;
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.sleeping);
  }
  cpu_set_t before;
  int took = team.threads > 1 && team_take_core(0, &before);
  work(context, 0);
  team_barrier();
  if (took) sched_setaffinity(0, sizeof before, &before);
  pthread_mutex_unlock(&team.one_at_a_time);
}

static void team_end(void) {
  pthread_mutex_lock(&team.sleeping);
  team.epoch = -1;
  pthread_cond_broadcast(&team.wake);
  pthread_mutex_unlock(&team.sleeping);
  for (int i = 1; i < team.threads; i++) pthread_join(team.thread[i], NULL);
  team.threads = 1;
  team.epoch = 0;
}

// Makes the team `threads` strong, the caller of team_run counted; returns how strong it is.
int team_resize(int threads) {
  pthread_mutex_lock(&team.one_at_a_time);
  team_end();
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  for (; team.threads < threads; team.threads++) {
    intptr_t number = team.threads;
    if (pthread_create(&team.thread[number], NULL, team_member, (void *)number)) break;
  }
  int strong = team.threads;
  pthread_mutex_unlock(&team.one_at_a_time);
  return strong;
}
