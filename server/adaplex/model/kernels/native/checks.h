// Checks of a step's indices, so that none leads outside of an array.

#pragma once

#include "types.h"
#include "vectors.h"

// runs [count]. True if they cover rows [0, rows) in order, none of them empty.
static int runs_cover(const Run *runs, long count, long rows) {
  long at = 0;
  for (long r = 0; r < count; r++) {
    if (runs[r].start != at || runs[r].stop <= at) return 0;
    at = runs[r].stop;
  }
  return at == rows;
}

// True if `token` is in the vocabulary, or a virtual token of the run's adapter.
static int is_known_token(const Model *m, const Run *run, long token) {
  if (token >= 0) return token < m->vocabulary;
  return run->sites && -token <= run->sites[m->embedding_module].virtual_count;
}

// DONE if every index of the step is valid, else the code of what is wrong.
static int check_step(const Model *m, const Step *step) {
  if (step->rows < 1 || step->sequences < 1 || step->wanted_rows < 0) return BAD_ROWS;
  if (step->first[0] != 0 || step->first[step->sequences] != step->rows) return BAD_ROWS;
  if (!runs_cover(step->run, step->runs, step->rows)) return BAD_ROWS;
  if (!runs_cover(step->head_run, step->head_runs, step->wanted_rows)) return BAD_ROWS;
  for (long i = 0; i < step->wanted_rows; i++)
    if (step->wanted[i] < 0 || step->wanted[i] >= step->rows) return BAD_ROWS;
  const Run *run = step->run;
  for (long s = 0; s < step->sequences; s++) {
    long start = step->first[s], stop = step->first[s + 1];
    if (start >= stop || stop > step->rows) return BAD_ROWS;
    for (long row = start; row < stop; row++) {
      long at = step->position[row];
      while (row >= run->stop) run++;
      if (!is_known_token(m, run, step->tokens[row])) return BAD_TOKEN;
      if (at < 0 || at >= m->positions || at >= step->width * PANEL) return BAD_POSITION;
      if (row > start && at != step->position[row - 1] + 1) return BAD_POSITION;
    }
    for (long b = 0; b <= step->position[stop - 1] / PANEL; b++) {
      long block = step->table[s * step->width + b];
      if (block < 0 || block >= m->blocks) return BAD_BLOCK;
    }
  }
  return DONE;
}
