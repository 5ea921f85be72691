// Included once for each element type: one product of a step, and the prefetch plan of its tiles.

// A product of all rows: y = x W' + bias; for rows of an adapter output_scale * y + b h + the adapter's bias.
typedef struct {
  const Weight *weight;
  const ACTIVATION *x;  // [rows, in], rows x_stride apart
  long x_stride;
  float *y;  // [rows, out], rows y_stride apart
  long y_stride;
  const Site *const *sites;  // [rows] of [modules]: as Workspace.sites
  long module;               // number of the product's module
  ACTIVATION *h;             // [rows, h_stride]: a x, where the site has a rank
  long h_stride;
  int replaces_rows;          // true if a site replaces rows of W
  NextProduct *next_product;  // or null
  QuantizedRows quantized;    // x in 8 bits, if the weight has int8_inputs
} NAME(ProductTask);

// The inputs of the R rows of a tile.
typedef struct {
  const ACTIVATION *x;  // [R, in], rows x_stride apart
  long x_stride;
  const PrefetchPlan *plan;  // or null
  RowBlock block;
} NAME(TileRows);

// True if rows [row, row + rows) have the same adapter.
static int NAME(rows_share_site)(const NAME(ProductTask) *task, long row, long rows) {
  const Site *const *sites = task->sites + row;
  for (long r = 1; r < rows; r++)
    if (sites[r] != sites[0]) return 0;
  return 1;
}

// Adds this tile's share of the next product's `a` to its prefetch plan.
static void NAME(add_next_product)(const NAME(ProductTask) *task, PrefetchPlan *plan) {
  NextProduct *next = task->next_product;
  long tile = next->tile++, row = next->row + tile / next->tiles, bytes = 0;
  const Site *sites = row < next->stop ? task->sites[row] : NULL;
  for (long i = 0; sites && i < next->modules; i++) {
    const Site *site = sites + next->module[i];
    if (!bytes) plan->next_a = site->a;
    bytes += site->rank * next->in_features * (long)sizeof(ELEMENT);
  }
  bytes /= next->tiles;
  plan->next_a += tile % next->tiles * bytes;
  plan->next_bytes = bytes * 8 / task->weight->in_features;
}

// Address of the panels of `b` of a row from `panel` on; without a rank, of x, which is cached already.
static const char *NAME(b_panels)(const NAME(ProductTask) *task, long row, long panel) {
  const Site *site = site_of(task->sites, row, task->module);
  if (!site || !site->rank) return (const char *)(task->x + row * task->x_stride);
  return (const char *)((const ELEMENT *)site->b + panel * PANEL * site->rank);
}

// Fills in the plan of the tile of rows [row, row + rows) at `panel` and returns 1. If its rows share an
// adapter, prefetches the few lines of their `b` at once and returns 0.
static __attribute__((noinline)) int NAME(fill_prefetch_plan)(const NAME(ProductTask) *task, long row,
                                                              long rows, long panel, PrefetchPlan *plan) {
  if (NAME(rows_share_site)(task, row, rows)) {
    const char *b = NAME(b_panels)(task, row, panel);
    for (long line = 0; line < PIECE_LINES; line++) prefetch(b + line * 64);
    return 0;
  }
  for (int i = 0; i < 8; i++)
    plan->piece[i] = NAME(b_panels)(task, row + i % rows, panel) + i / rows * PIECE_LINES * 64;
  plan->next_a = plan->piece[0];
  plan->next_bytes = 0;
  if (task->next_product && rows >= 4) NAME(add_next_product)(task, plan);
  return 1;
}
