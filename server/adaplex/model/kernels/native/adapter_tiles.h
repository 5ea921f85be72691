// Included once for each element type: the changes of adapters to the outputs of a product.

// x [n] activations, y [n] elements. The sum of x * y.
INLINE float NAME(dot)(const ACTIVATION *x, const ELEMENT *y, long n) {
  VecF32 acc = {0};
  for (long i = 0; i < n; i += UNIT(LINE))
    acc = UNIT(dot)(acc, UNIT(weights)(y + i, n - i), UNIT(inputs)(x + i, n - i));
  return sum_lanes(acc);
}

// Recomputes y of one row at the columns of [panel, panel + panels) whose row of W the site replaces.
static void NAME(replace_columns)(const NAME(ProductTask) *task, const Site *site, long row, long panel,
                                  long panels) {
  const Weight *w = task->weight;
  float *y = task->y + row * task->y_stride;
  for (long j = first_replaced_row(site, panel * PANEL); j < site->row_count; j++) {
    long column = site->row_ids[j];
    if (column >= (panel + panels) * PANEL) return;
    y[column] = NAME(dot)(task->x + row * task->x_stride, (const ELEMENT *)site->rows + j * w->in_features,
                          w->in_features);
    if (w->bias) y[column] += w->bias[column];
  }
}

// y = output_scale * y + b h + bias of the site, for R rows of one adapter and P panels.
INLINE void NAME(add_adapter_tile)(const NAME(ProductTask) *task, const Site *site, long row, long panel,
                                   const int R, const int P) {
  long column = panel * PANEL, left = task->weight->out_features - column;
  float *y = task->y + row * task->y_stride + column;
  Tile acc;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++)
      acc[r][v] = f32_load_partial(y + r * task->y_stride + v * VEC_LANES, left - v * VEC_LANES);
  if (site->output_scale)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++) {
      const ELEMENT *from = (const ELEMENT *)site->output_scale + column + v * VEC_LANES;
      VecF32 scale = NAME(load_partial)(from, left - v * VEC_LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][v] *= scale;
    }
  NAME(expand)(task->h + row * task->h_stride, task->h_stride, site, column + left, panel, R, P, acc);
  if (site->bias)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++) {
      const ELEMENT *from = (const ELEMENT *)site->bias + column + v * VEC_LANES;
      VecF32 shift = NAME(load_partial)(from, left - v * VEC_LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][v] += shift;
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++)
      f32_store_partial(y + r * task->y_stride + v * VEC_LANES, acc[r][v], left - v * VEC_LANES);
}

// add_adapter_tile for two panels of one row, or the last one.
static __attribute__((noinline)) void NAME(add_adapter_row)(const NAME(ProductTask) *task, const Site *site,
                                                            long row, long panel, long panels) {
  long p = 0;
  for (; p + 2 <= panels && PANEL_VECS <= 2; p += 2) NAME(add_adapter_tile)(task, site, row, panel + p, 1, 2);
  for (; p < panels; p++) NAME(add_adapter_tile)(task, site, row, panel + p, 1, 1);
}

// add_adapter_tile for TILE_ROWS rows of one adapter and a tile's panels.
static __attribute__((noinline)) void NAME(add_adapter_rows)(const NAME(ProductTask) *task, const Site *site,
                                                             long row, long panel) {
  NAME(add_adapter_tile)(task, site, row, panel, TILE_ROWS, TILE_PANELS(TILE_ROWS));
}

// Applies the changes of each row's adapter to y of rows [row, row + rows) and panels [panel, panel +
// panels).
static void NAME(add_adapters)(const NAME(ProductTask) *task, long row, long rows, long panel, long panels) {
  for (long r = 0; task->replaces_rows && r < rows; r++) {
    const Site *site = site_of(task->sites, row + r, task->module);
    if (site) NAME(replace_columns)(task, site, row + r, panel, panels);
  }
  for (long last = row + rows; row < last;) {
    const Site *site = site_of(task->sites, row, task->module);
    int tile = row + TILE_ROWS <= last && panels == TILE_PANELS(TILE_ROWS) &&
               NAME(rows_share_site)(task, row, TILE_ROWS);
    if (site && tile) NAME(add_adapter_rows)(task, site, row, panel);
    if (site && !tile) NAME(add_adapter_row)(task, site, row, panel, panels);
    row += tile ? TILE_ROWS : 1;
  }
}
