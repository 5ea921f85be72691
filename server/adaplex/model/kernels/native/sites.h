// What adapters do: the line of a row, and what a step's adapters need of it beside products.

#pragma once

#include <stddef.h>

#include "types.h"

// What the adapter of a row does at a module; null for the base. `sites` is null when all rows are.
static inline const Site *site_of(const Site *const *sites, long row, long module) {
  return sites && sites[row] ? sites[row] + module : NULL;
}

// The first replaced row whose id is at least `id`; row_count when there is none.
static long first_row(const Site *site, long id) {
  long from = 0, to = site->row_count;
  while (from < to) {
    long middle = (from + to) / 2;
    if (site->row_ids[middle] < id)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

// Whether any adapter scales what a module reads.
static int scales_input(const Run *runs, long run_count, long module) {
  for (long r = 0; r < run_count; r++)
    if (runs[r].sites && runs[r].sites[module].input_scale) return 1;
  return 0;
}

typedef struct {
  long rank;                                 // the widest
  int input_scales, bottlenecks, head_rows;  // whether any adapter has some
} Needs;

static void survey(const Model *m, const Run *runs, long count, Needs *needs) {
  for (long r = 0; r < count; r++) {
    const Site *sites = runs[r].sites;
    if (!sites) continue;
    for (long i = 0; i < m->modules; i++) {
      if (sites[i].rank > needs->rank) needs->rank = sites[i].rank;
      needs->input_scales |= sites[i].input_scale != NULL;
    }
    for (long i = 0; i < m->layers; i++) {
      const int64_t *modules = m->layer[i].modules;
      needs->bottlenecks |= sites[modules[ATTENTION]].rank > 0 || sites[modules[MLP]].rank > 0;
    }
    needs->head_rows |= sites[m->head_module].row_count > 0;
  }
}
