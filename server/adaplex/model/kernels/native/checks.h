// Whether a step is sound: no index of it may lead out of an array.

#pragma once

#include "types.h"
#include "vectors.h"

// Runs must cover [0, rows) in order.
static int covers(const Run *runs, long count, long rows) {
  long at = 0;
  for (long r = 0; r < count; r++) {
    if (runs[r].start != at || runs[r].stop <= at) return 0;
    at = runs[r].stop;
  }
  return at == rows;
}

// A token of the vocabulary, or a virtual one that the adapter has.
static int known(const Model *m, const Run *run, long token) {
  if (token >= 0) return token < m->vocabulary;
  return run->sites && -token <= run->sites[m->embedding_module].virtual_count;
}

// What is wrong with a step, DONE if nothing.
static int check_step(const Model *m, const Step *step) {
  if (step->rows < 1 || step->sequences < 1 || step->wanted_rows < 0) return BAD_ROWS;
  if (step->first[0] != 0 || step->first[step->sequences] != step->rows) return BAD_ROWS;
  if (!covers(step->run, step->runs, step->rows)) return BAD_ROWS;
  if (!covers(step->head_run, step->head_runs, step->wanted_rows)) return BAD_ROWS;
  for (long i = 0; i < step->wanted_rows; i++)
    if (step->wanted[i] < 0 || step->wanted[i] >= step->rows) return BAD_ROWS;
  const Run *run = step->run;
  for (long s = 0; s < step->sequences; s++) {
    long start = step->first[s], stop = step->first[s + 1];
    if (start >= stop || stop > step->rows) return BAD_ROWS;
    for (long row = start; row < stop; row++) {
      long at = step->position[row];
      while (row >= run->stop) run++;
      if (!known(m, run, step->tokens[row])) return BAD_TOKEN;
      if (at < 0 || at >= m->positions || at >= step->width * LANES) return BAD_POSITION;
      if (row > start && at != step->position[row - 1] + 1) return BAD_POSITION;
    }
    for (long b = 0; b <= step->position[stop - 1] / LANES; b++) {
      long block = step->table[s * step->width + b];
      if (block < 0 || block >= m->blocks) return BAD_BLOCK;
    }
  }
  return DONE;
}
