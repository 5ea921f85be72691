// Memory of a step: one buffer that grows, cut up anew for each step.

#pragma once

#include "sites.h"
#include "team.h"
#include "types.h"
#include "vectors.h"

#define BLOCK_ROWS 4    // rows of one adapter that share what they read of it
#define ROW_GROUP 4     // rows in one ticket of what is done row by row
#define SHRINK_ROWS 16  // rows in one ticket of a shrink
#define PANEL_GROUP 4   // panels in one ticket of a product
#define READ_ROWS 8     // rows in one ticket of bottlenecks
#define QUERY_TOKENS 8  // neighbouring tokens of one sequence that share what they read of the cache

// At most QUERY_TOKENS neighbouring rows of one sequence.
typedef struct {
  long sequence, start, stop;
} Query_span;

// Tickets from `first_ticket` on: rows [start, stop) of a part, by a weight of their own or not.
typedef struct {
  int part;
  long start, stop;
  const Site *own;
  long first_ticket;
} Pass;

typedef struct {
  float *residual;                        // [rows, hidden]
  void *normed, *query, *attended, *act;  // elements
  float *wide;                            // [rows, widest product]
  void *low;                              // elements [3, rows, rank_stride]: what shrinks give
  void *scaled;                           // elements: scaled copies of what a phase reads, if any are
  int32_t *home;                          // [rows] block of each row's key and value
  const Site **sites, **head_sites;       // of each row and wanted row; null when all are of the base
  Query_span *span;
  Needs needs;
  char *member;  // [threads, member_size]
  long spans, rank_stride, score_stride, member_size, passes;
} Work_space;

// What the next products shrink by: the `a` of a thread's rows at some modules. Neighbouring modules' are
// neighbours in memory.
typedef struct {
  long parts, in, module[3];
  long row, stop;
  long tiles;  // that ask for a row
  long tile;   // which of the thread's comes next
} Coming;

// What a tile of a product asks memory for while it multiplies: products wait for arithmetic, adapters for
// memory, so that both are under way at once. The panels of `b` of its rows, which it needs at its end, in
// pieces of PIECE lines, a row's pieces as far apart as there are rows; and its share of what the next
// products shrink by.
#define PIECE 16
typedef struct {
  const char *piece[8];
  const char *coming;
  long pace;  // bytes of it for each eight inputs
} Asks;

// A share of it, for each eight inputs.
INLINE void ask(const Asks *asks, long line) {
  const char *at = asks->piece[line / 8 % 8] + line % 8 * 128;
  expect(at);
  expect(at + 64);
  const char *from = asks->coming + line * asks->pace;
  for (at = from; at < from + asks->pace; at += 64) expect_later(at);
}

// Which of the blocks of rows that go through the same panels a tile is. Each asks memory for its share of the
// panels behind them, so that they come all the time and not only beside the first.
typedef struct {
  long mine, all;
} Turn;

// The first line of a turn's share of panels of so many lines, and the bytes from one to the next.
INLINE const char *share_of(const char *panels, long lines, Turn turn) {
  return panels + lines * 64 * turn.mine / turn.all;
}

INLINE long pace_of(Turn turn) { return (64 + turn.all - 1) / turn.all; }

// What each thread has for itself.
typedef struct {
  Draw draw;
  Pass *passes;
  float *scores, *mixed;
  void *weights, *query, *read;
} Member;

static struct {
  pthread_mutex_t in_use;
  char *start;
  size_t size;
} memory = {.in_use = PTHREAD_MUTEX_INITIALIZER};

// Cuts `bytes` off a buffer, whole lines of a cache; without a buffer only counts.
static void *cut(char *buffer, size_t *used, size_t bytes) {
  void *place = buffer ? buffer + *used : NULL;
  *used += (bytes + 63) / 64 * 64;
  return place;
}

static inline long at_least(long a, long b) { return a > b ? a : b; }
static inline long at_most(long a, long b) { return a < b ? a : b; }
static inline long row_groups(long rows) { return (rows + ROW_GROUP - 1) / ROW_GROUP; }

static inline long panels_of(const Weight *w) { return (w->out + LANES - 1) / LANES; }

static inline long panel_groups(const Weight *w) { return (panels_of(w) + PANEL_GROUP - 1) / PANEL_GROUP; }

// Whether the rows of a site are multiplied by another weight than the base's.
static inline int has_own(const Site *site, const Weight *weight) {
  return site->dense || (site->zeros && weight->group);
}

// The lines of each row's adapter; null when no row has any.
static const Site **spread_sites(const Run *runs, long count, const Site **sites) {
  int any = 0;
  for (long r = 0; r < count; r++) {
    any |= runs[r].sites != NULL;
    for (long row = runs[r].start; row < runs[r].stop; row++) sites[row] = runs[r].sites;
  }
  return any ? sites : NULL;
}

// Spans of up to `tokens`; counts when there is no room to write to.
static long cut_spans(const Step *step, long tokens, Query_span *span) {
  long spans = 0;
  for (long s = 0; s < step->sequences; s++)
    for (long start = step->first[s]; start < step->first[s + 1]; start += tokens, spans++)
      if (span) span[spans] = (Query_span){s, start, at_most(start + tokens, step->first[s + 1])};
  return spans;
}

// As many tokens as keep every thread busy: a long context makes a few long tickets.
static long span_tokens(const Model *m, const Step *step) {
  long tokens = QUERY_TOKENS;
  while (tokens > 2 && cut_spans(step, tokens, NULL) * m->kv_heads < 4 * team.threads) tokens /= 2;
  return tokens;
}

// The pass of a ticket, `now` being that of the ticket before it; the last of `passes` only ends them.
static const Pass *pass_of(const Pass *passes, const Pass *now, long ticket) {
  if (ticket < now->first_ticket) now = passes;
  while (ticket >= now[1].first_ticket) now++;
  return now;
}

static int has_rank(const Site *sites, const long *module, long modules) {
  for (long i = 0; i < modules; i++)
    if (sites[module[i]].rank) return 1;
  return 0;
}

// Makes a pass of each run with a rank at some of the modules, `rows` of it a ticket; returns the tickets.
static long rank_passes(Pass *pass, const long *module, long modules, const Run *runs, long count,
                        long rows) {
  long tickets = 0;
  for (long r = 0; r < count; r++) {
    if (!runs[r].sites || !has_rank(runs[r].sites, module, modules)) continue;
    *pass++ = (Pass){0, runs[r].start, runs[r].stop, NULL, tickets};
    tickets += (runs[r].stop - runs[r].start + rows - 1) / rows;
  }
  *pass = (Pass){.first_ticket = tickets};
  return tickets;
}

// Cuts up what one thread has, from `own` on; `used` counts the bytes.
static Member member_of(const Work_space *space, const Model *m, size_t element, int thread, char *own,
                        size_t *used) {
  long queries = QUERY_TOKENS * (m->heads / m->kv_heads), size = queries * m->head_dim;
  Member me = {.draw = {.thread = thread}};
  me.passes = cut(own, used, sizeof(Pass) * (size_t)space->passes);
  me.scores = cut(own, used, sizeof(float) * (size_t)(queries * space->score_stride));
  me.mixed = cut(own, used, sizeof(float) * (size_t)size);
  me.weights = cut(own, used, element * (size_t)(queries * space->score_stride));
  me.query = cut(own, used, element * (size_t)size);
  if (space->needs.bottlenecks) me.read = cut(own, used, element * (size_t)(READ_ROWS * m->hidden));
  return me;
}

static void cut_up(Work_space *space, const Model *m, const Step *step, size_t element, char *from,
                   size_t *used) {
  size_t rows = (size_t)at_least(step->rows, step->wanted_rows), wide = sizeof(float);
  size_t heads = (size_t)(m->heads * m->head_dim), both = (size_t)(m->kv_heads * m->head_dim * 2);
  size_t widest = (size_t)at_least(at_least(m->hidden, 2 * m->middle), (long)(heads + both));
  size_t inputs = (size_t)at_least(3 * m->hidden, at_least(m->middle, (long)heads));
  space->residual = cut(from, used, wide * rows * (size_t)m->hidden);
  space->normed = cut(from, used, element * rows * (size_t)m->hidden);
  space->query = cut(from, used, element * rows * heads);
  space->attended = cut(from, used, element * rows * heads);
  space->act = cut(from, used, element * rows * (size_t)m->middle);
  space->wide = cut(from, used, wide * rows * widest);
  space->low = cut(from, used, element * 3 * rows * (size_t)space->rank_stride);
  if (space->needs.input_scales) space->scaled = cut(from, used, element * rows * inputs);
  space->home = cut(from, used, sizeof(int32_t) * rows);
  space->sites = cut(from, used, sizeof(Site *) * rows);
  space->head_sites = cut(from, used, sizeof(Site *) * rows);
  space->span = cut(from, used, sizeof(Query_span) * (size_t)space->spans);
  space->member = cut(from, used, (size_t)(space->member_size * team.threads));
}

// Fills `space` for a step; the caller holds memory.in_use. Returns DONE or NO_MEMORY.
static int lay_out(Work_space *space, const Model *m, const Step *step, size_t element) {
  long tokens = span_tokens(m, step);
  space->spans = cut_spans(step, tokens, NULL);
  space->score_stride = step->width * LANES;
  space->passes = 3 * (2 * at_least(step->runs, step->head_runs) + 1) + 1;
  survey(m, step->run, step->runs, &space->needs);
  survey(m, step->head_run, step->head_runs, &space->needs);
  space->rank_stride = space->needs.rank + space->needs.rank % 2;  // whole units
  size_t size = 0;
  member_of(space, m, element, 0, NULL, &size);
  space->member_size = (long)size;
  size = 0;
  cut_up(space, m, step, element, NULL, &size);
  if (size > memory.size) {
    free(memory.start);
    memory.start = aligned_alloc(64, size);
    memory.size = memory.start ? size : 0;
    if (!memory.start) return NO_MEMORY;
  }
  size = 0;
  cut_up(space, m, step, element, memory.start, &size);
  space->sites = spread_sites(step->run, step->runs, space->sites);
  space->head_sites = spread_sites(step->head_run, step->head_runs, space->head_sites);
  cut_spans(step, tokens, space->span);
  for (long s = 0; s < step->sequences; s++)
    for (long row = step->first[s]; row < step->first[s + 1]; row++)
      space->home[row] = step->table[s * step->width + step->position[row] / LANES];
  return DONE;
}

// Index of the largest value, the first of equals; -1 when the largest is not finite or any is NaN.
static int32_t likeliest(const float *x, long n) {
  const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vec best = splat(-INFINITY);
  ints where = {0}, nan = {0};
  for (long i = 0; i < n; i += LANES) {
    vec v = f32_load_part(x + i, n - i);
    ints at = lane + (int32_t)i, more = (v > best) & (at < (int32_t)n);
    best = select_lanes(more, v, best);
    where = (more & at) | (~more & where);
    nan |= v != v;
  }
  float peak = max_lanes(best);
  int32_t first = INT32_MAX, broken = 0;
  for (int i = 0; i < LANES; i++) {
    if (best[i] == peak && where[i] < first) first = where[i];
    broken |= nan[i];
  }
  return broken || !(peak < INFINITY && peak > -INFINITY) ? -1 : first;
}
