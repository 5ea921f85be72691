// The team's threads; see team.h.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "team.h"

#include "kernels.h"

Team team = {.one_at_a_time = PTHREAD_MUTEX_INITIALIZER,
             .sleeping = PTHREAD_MUTEX_INITIALIZER,
             .wake = PTHREAD_COND_INITIALIZER,
             .threads = 1};

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
void team_run(WorkFunction work, void *context) {
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
