// The buffers of a step: one allocation that grows, divided anew for each step.

#pragma once

#include "integers.h"
#include "int8_head.h"
#include "sites.h"
#include "sizes.h"
#include "team.h"
#include "ticket_ranges.h"

// Rows [start, stop) of one sequence, at most QUERY_TOKENS.
typedef struct {
  long sequence, start, stop;
} QuerySpan;

// The buffers of a step; `elements` are of the compute type, fp32 or bf16.
typedef struct {
  float *residual;                   // [rows, hidden]
  void *normed;                      // elements [rows, hidden]
  void *query, *attended;            // elements [rows, heads * head_dim]
  void *act;                         // elements [rows, middle]
  float *wide;                       // [rows, width of the widest phase]: outputs of a phase's products
  void *shrunk;                      // elements [3, rows, rank_stride]: a x of a phase's products
  void *scaled;                      // elements [rows, inputs of a phase]: scaled copies, if any are needed
  QuantizedRows quantized;           // [rows, inputs of a phase] in 8 bits, if a weight has int8_inputs
  int32_t *kv_block;                 // [rows]: block of each row's key and value
  const Site **sites, **head_sites;  // [rows], [wanted_rows] of [modules]; null if every row has the base
  QuerySpan *span;                   // [spans]
  StepNeeds needs;
  Screening screening;   // of the wanted rows; all zero if the step wants their logits
  char *thread_buffers;  // [threads, thread_bytes]
  long spans, rank_stride, score_stride, thread_bytes, ranges;
} Workspace;

// The cursor and buffers of one thread. queries = QUERY_TOKENS * heads / kv_heads.
typedef struct {
  TicketCursor cursor;
  TicketRange *ranges;     // [ranges]
  float *scores;           // [queries, score_stride]
  float *weighted;         // [queries, head_dim]
  void *weights;           // elements [queries, score_stride]
  void *query;             // elements [queries, head_dim]
  void *bottleneck_input;  // elements [READ_ROWS, hidden], if a bottleneck needs it
} ThreadContext;

// The allocation, and the lock that a step owns while it uses it.
static struct {
  pthread_mutex_t in_use;
  char *start;
  size_t size;
} memory = {.in_use = PTHREAD_MUTEX_INITIALIZER};

// buffer [size]. The next `bytes` of it, rounded up to whole cache lines; adds them to `used`. Without a
// buffer, null: the call only counts.
static void *bump_allocate(char *buffer, size_t *used, size_t bytes) {
  void *place = buffer ? buffer + *used : NULL;
  *used += (bytes + 63) / 64 * 64;
  return place;
}

// runs [count], sites [rows]. Fills in the sites of each row's adapter; returns null if every row has the
// base.
static const Site **sites_of_rows(const Run *runs, long count, const Site **sites) {
  int any = 0;
  for (long r = 0; r < count; r++) {
    any |= runs[r].sites != NULL;
    for (long row = runs[r].start; row < runs[r].stop; row++) sites[row] = runs[r].sites;
  }
  return any ? sites : NULL;
}

// span [spans] or null. Splits the rows of each sequence into spans of up to `tokens`; returns their number.
static long split_into_spans(const Step *step, long tokens, QuerySpan *span) {
  long spans = 0;
  for (long s = 0; s < step->sequences; s++)
    for (long start = step->first[s]; start < step->first[s + 1]; start += tokens, spans++)
      if (span) span[spans] = (QuerySpan){s, start, min_long(start + tokens, step->first[s + 1])};
  return spans;
}

// Tokens of a span: as many as still give every thread several tickets, since a long context makes few long
// tickets.
static long tokens_per_span(const Model *m, const Step *step) {
  long tokens = QUERY_TOKENS;
  while (tokens > 2 && split_into_spans(step, tokens, NULL) * m->kv_heads < 4 * team.threads) tokens /= 2;
  return tokens;
}

// buffer [thread_bytes] or null. Divides the buffer of one thread; adds the bytes to `used`.
static ThreadContext thread_context(const Workspace *space, const Model *m, size_t element, int thread,
                                    char *buffer, size_t *used) {
  long queries = QUERY_TOKENS * (m->heads / m->kv_heads), size = queries * m->head_dim;
  ThreadContext me = {.cursor = {.thread = thread}};
  me.ranges = bump_allocate(buffer, used, sizeof(TicketRange) * (size_t)space->ranges);
  me.scores = bump_allocate(buffer, used, sizeof(float) * (size_t)(queries * space->score_stride));
  me.weighted = bump_allocate(buffer, used, sizeof(float) * (size_t)size);
  me.weights = bump_allocate(buffer, used, element * (size_t)(queries * space->score_stride));
  me.query = bump_allocate(buffer, used, element * (size_t)size);
  if (space->needs.bottlenecks)
    me.bottleneck_input = bump_allocate(buffer, used, element * (size_t)(READ_ROWS * m->hidden));
  return me;
}

// linear [count]. True if one of them has int8_inputs.
static int has_int8_inputs(const Linear *linear, long count) {
  for (long i = 0; i < count; i++)
    if (linear[i].weight.int8_inputs) return 1;
  return 0;
}

// True if a linear of a layer has int8_inputs.
static int any_int8_inputs(const Model *m) {
  for (const Layer *l = m->layer; l < m->layer + m->layers; l++)
    if (has_int8_inputs(l->qkv, l->qkv_count) || has_int8_inputs(l->gate_up, l->gate_up_count) ||
        has_int8_inputs(&l->out, 1) || has_int8_inputs(&l->down, 1))
      return 1;
  return 0;
}

// The screening of a step: of its wanted rows, if it wants only their likeliest tokens and no adapter changes
// the output layer; else of no row.
static Screening screening_of(const Model *m, const Step *step) {
  if (!step->only_likeliest || !m->int8_head.panels) return (Screening){0};
  if (any_change(step->head_run, step->head_runs, m->head_module)) return (Screening){0};
  return (Screening){
      .rows = step->wanted_rows, .stride = (m->hidden + 3) / 4 * 4, .panels = panel_count(&m->head)};
}

// buffer [size] or null. Divides the part of a step's buffer that its screening uses; adds the bytes to
// `used`.
static void allocate_screening(Screening *s, char *buffer, size_t *used) {
  s->x16 = bump_allocate(buffer, used, sizeof(int16_t) * (size_t)(s->rows * s->stride));
  s->row = bump_allocate(buffer, used, sizeof(ScreenedRow) * (size_t)s->rows);
  s->upper = bump_allocate(buffer, used, sizeof(float) * (size_t)(s->rows * s->panels));
  s->lower = bump_allocate(buffer, used, sizeof(float) * (size_t)(s->rows * s->panels));
}

// buffer [size] or null. Divides the step's buffer; adds the bytes to `used`.
static void allocate_buffers(Workspace *space, const Model *m, const Step *step, size_t element, char *buffer,
                             size_t *used) {
  size_t rows = (size_t)max_long(step->rows, step->wanted_rows), wide = sizeof(float);
  size_t heads = (size_t)(m->heads * m->head_dim), both = (size_t)(m->kv_heads * m->head_dim * 2);
  size_t widest = (size_t)max_long(max_long(m->hidden, 2 * m->middle), (long)(heads + both));
  size_t inputs = (size_t)max_long(3 * m->hidden, max_long(m->middle, (long)heads));
  space->residual = bump_allocate(buffer, used, wide * rows * (size_t)m->hidden);
  space->normed = bump_allocate(buffer, used, element * rows * (size_t)m->hidden);
  space->query = bump_allocate(buffer, used, element * rows * heads);
  space->attended = bump_allocate(buffer, used, element * rows * heads);
  space->act = bump_allocate(buffer, used, element * rows * (size_t)m->middle);
  space->wide = bump_allocate(buffer, used, wide * rows * widest);
  space->shrunk = bump_allocate(buffer, used, element * 3 * rows * (size_t)space->rank_stride);
  if (space->needs.input_scales) space->scaled = bump_allocate(buffer, used, element * rows * inputs);
  if (any_int8_inputs(m)) {
    char *start = bump_allocate(buffer, used, quantized_bytes((long)rows, (long)inputs));
    if (start) space->quantized = quantized_rows(start, (long)rows, (long)inputs);
  }
  space->kv_block = bump_allocate(buffer, used, sizeof(int32_t) * rows);
  space->sites = bump_allocate(buffer, used, sizeof(Site *) * rows);
  space->head_sites = bump_allocate(buffer, used, sizeof(Site *) * rows);
  space->span = bump_allocate(buffer, used, sizeof(QuerySpan) * (size_t)space->spans);
  if (space->screening.rows) allocate_screening(&space->screening, buffer, used);
  space->thread_buffers = bump_allocate(buffer, used, (size_t)(space->thread_bytes * team.threads));
}

// Fills in `space` for a step; the caller has locked memory.in_use. Returns DONE or NO_MEMORY.
static int prepare_workspace(Workspace *space, const Model *m, const Step *step, size_t element) {
  long tokens = tokens_per_span(m, step);
  space->spans = split_into_spans(step, tokens, NULL);
  space->score_stride = step->width * PANEL;
  space->ranges = 3 * (2 * max_long(step->runs, step->head_runs) + 1) + 1;
  scan_sites(m, step->run, step->runs, &space->needs);
  scan_sites(m, step->head_run, step->head_runs, &space->needs);
  space->screening = screening_of(m, step);
  space->rank_stride = space->needs.rank + space->needs.rank % 2;  // whole units
  size_t size = 0;
  thread_context(space, m, element, 0, NULL, &size);
  space->thread_bytes = (long)size;
  size = 0;
  allocate_buffers(space, m, step, element, NULL, &size);
  if (size > memory.size) {
    free(memory.start);
    memory.start = aligned_alloc(64, size);
    memory.size = memory.start ? size : 0;
    if (!memory.start) return NO_MEMORY;
  }
  size = 0;
  allocate_buffers(space, m, step, element, memory.start, &size);
  space->sites = sites_of_rows(step->run, step->runs, space->sites);
  space->head_sites = sites_of_rows(step->head_run, step->head_runs, space->head_sites);
  split_into_spans(step, tokens, space->span);
  for (long s = 0; s < step->sequences; s++)
    for (long row = step->first[s]; row < step->first[s + 1]; row++)
      space->kv_block[row] = step->table[s * step->width + step->position[row] / PANEL];
  return DONE;
}
