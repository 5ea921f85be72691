// Access to sites (types.h), and which kinds of change the adapters of a step need besides products.

#pragma once

#include <stddef.h>
#include <string.h>

#include "types.h"

// sites [rows] of [modules]. The site of a row's adapter at a module; null for the base. `sites` is null if
// every row has the base.
static inline const Site *site_of(const Site *const *sites, long row, long module) {
  return sites && sites[row] ? sites[row] + module : NULL;
}

// True if the rows of a site are multiplied by another weight than the base's.
static inline int has_own_weight(const Site *site, const Weight *weight) {
  return site->dense || (site->zeros && weight->group);
}

// The site of a row's adapter at a norm, as site_of; null if adapters cannot change the norm.
static inline const Site *site_of_norm(const Site *const *sites, long row, const Norm *norm) {
  return norm->module < 0 ? NULL : site_of(sites, row, norm->module);
}

// True if an adapter has a bottleneck at the module of a block, -1 for none.
static inline int has_bottleneck(const Site *sites, long module) {
  return module >= 0 && sites[module].rank > 0;
}

// sites [modules], module [modules]. True if a site of the listed modules has a rank.
static int has_rank(const Site *sites, const long *module, long modules) {
  for (long i = 0; i < modules; i++)
    if (sites[module[i]].rank) return 1;
  return 0;
}

// Index of the first replaced row whose id is at least `id`; row_count if there is none.
static long first_replaced_row(const Site *site, long id) {
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

// runs [run_count]. True if an adapter scales the input of a module.
static int any_input_scale(const Run *runs, long run_count, long module) {
  for (long r = 0; r < run_count; r++)
    if (runs[r].sites && runs[r].sites[module].input_scale) return 1;
  return 0;
}

// runs [run_count]. True if an adapter changes a module.
static int any_change(const Run *runs, long run_count, long module) {
  static const Site unchanged;
  for (long r = 0; r < run_count; r++)
    if (runs[r].sites && memcmp(runs[r].sites + module, &unchanged, sizeof unchanged)) return 1;
  return 0;
}

// Largest rank of any site, and whether any adapter has an input scale, a bottleneck, or replaced rows of the
// output layer.
typedef struct {
  long rank;
  int input_scales, bottlenecks, head_rows;
} StepNeeds;

// runs [count]. Adds the needs of their adapters to `needs`.
static void scan_sites(const Model *m, const Run *runs, long count, StepNeeds *needs) {
  for (long r = 0; r < count; r++) {
    const Site *sites = runs[r].sites;
    if (!sites) continue;
    for (long i = 0; i < m->modules; i++) {
      if (sites[i].rank > needs->rank) needs->rank = sites[i].rank;
      needs->input_scales |= sites[i].input_scale != NULL;
    }
    for (long i = 0; i < m->layers; i++) {
      const Layer *l = m->layer + i;
      needs->bottlenecks |= has_bottleneck(sites, l->attention_module);
      needs->bottlenecks |= has_bottleneck(sites, l->mlp_module);
    }
    needs->head_rows |= sites[m->head_module].row_count > 0;
  }
}
