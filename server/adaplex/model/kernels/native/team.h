// Team: threads that run one function together, and share its work by tickets.
//
// Whoever is free takes the next ticket, so a thread that the system holds up delays the others by
// one ticket, not by its share.

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
  _Alignas(64) atomic_long ticket;
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

static void team_barrier(void) {
  unsigned generation = atomic_load(&team.generation);
  if (atomic_fetch_add(&team.arrived, 1) + 1 == team.threads) {
    atomic_store(&team.arrived, 0);
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

// The next of `count` tickets, or -1 after the last, when all threads have done theirs. `base` is the
// thread's own: every thread draws one ticket too many in each round, so the next round starts at
// count + threads.
static inline long team_next(long *base, long count) {
  long mine = atomic_fetch_add(&team.ticket, 1) - *base;
  if (mine < count) return mine;
  *base += count + team.threads;
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
  atomic_store(&team.ticket, 0);
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
