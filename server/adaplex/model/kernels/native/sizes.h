// Sizes of tiles and tickets, and arithmetic of sizes.

#pragma once

#include "types.h"
#include "units.h"
#include "vectors.h"

#define BLOCK_ROWS 4    // rows of one adapter that share its loads in a shrink
#define SHRINK_RANKS (VEC_LANES == 16 ? 4 : 2)  // ranks that a block of rows is multiplied by at once
#define ROW_GROUP 4     // rows of one ticket of row operations
#define SHRINK_ROWS 16  // rows of one ticket of a shrink
#define PANEL_GROUP 4   // panels of one ticket of a product
#define READ_ROWS 8     // rows of one ticket of bottlenecks
#define QUERY_TOKENS 8  // neighbouring tokens of one sequence that share loads of keys and values

static inline long max_long(long a, long b) { return a > b ? a : b; }
static inline long min_long(long a, long b) { return a < b ? a : b; }

static inline long row_group_count(long rows) { return (rows + ROW_GROUP - 1) / ROW_GROUP; }

static inline long panel_count(const Weight *w) { return (w->out_features + PANEL - 1) / PANEL; }

static inline long panel_group_count(const Weight *w) {
  return (panel_count(w) + PANEL_GROUP - 1) / PANEL_GROUP;
}
