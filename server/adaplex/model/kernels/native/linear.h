// Included once for each element type: y = x W' for a frozen W [out, in], plus the changes of adapters.
//
// W is stored in panels of 16 output columns. Dense: [panels, in / PER_UNIT, 16] units of four bytes, each
// PER_UNIT neighbouring inputs of one column. nf4: [panels, in / 8, 32] halves of two bytes; half (n, p) of
// line v has in nibble j the code of column n at input 8 v + 2 j + p; scales as in types.h. int4: the same
// panels with other codes and scales; see int4.h.
//
// Each output is one chain of operations, whose order does not depend on the number of rows.

// panel: dense panels [P, units, 16]; acc [R, P] vectors of 16 columns.
// acc[r][p] = x[r] W[columns of panel p]'.
INLINE void NAME(dense_tile)(NAME(TileRows) rows, const char *panel, long units, const int R, const int P,
                             F32x16 acc[8][4]) {
  const char *next = share_start(panel + P * units * 64, units, rows.block);
  const long next_stride = share_stride(rows.block);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (F32x16){0};
  for (long u = 0; u < units; u++) {
    U32x16 w[4];
    if (rows.plan && u % (8 / PER_UNIT) == 0) prefetch_share(rows.plan, u / (8 / PER_UNIT));
    UNROLL for (int p = 0; p < P; p++) {
      w[p] = load_words(panel + (p * units + u) * 64);
      prefetch(next + p * units * 64 + u * next_stride);
    }
    UNROLL for (int r = 0; r < R; r++) {
      U32x16 unit = NAME(broadcast_unit)(rows.x + r * rows.x_stride, u);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], w[p], unit);
    }
  }
}

#if PER_UNIT == 2
// panel: nf4 panels [P, 8 * blocks, 32]; scales [P, blocks, 16]; acc [R, P] vectors of 16 columns.
// acc[r][p] = x[r] W[columns of panel p]'.
INLINE void NAME(nf4_tile)(NAME(TileRows) rows, const char *panel, const float *scales, long blocks,
                           const int R, const int P, F32x16 acc[8][4]) {
  const char *next = share_start(panel + P * blocks * 512, 8 * blocks, rows.block);
  const long next_stride = share_stride(rows.block);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (F32x16){0};
  for (long block = 0; block < blocks; block++) {
    F32x16 block_sum[8][4];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++) block_sum[r][p] = (F32x16){0};
    for (long line = 8 * block; line < 8 * block + 8; line++) {
      U16x32 packed[4];
      if (rows.plan) prefetch_share(rows.plan, line);
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = (U16x32)load_words(panel + (p * 8 * blocks + line) * 64);
        prefetch(next + p * blocks * 512 + line * next_stride);
      }
      UNROLL for (int j = 0; j < 4; j++) {
        U32x16 w[4];
        UNROLL for (int p = 0; p < P; p++) w[p] = look_up(&NF4, packed[p], j);
        UNROLL for (int r = 0; r < R; r++) {
          U32x16 unit = NAME(broadcast_unit)(rows.x + r * rows.x_stride, 4 * line + j);
          UNROLL for (int p = 0; p < P; p++) block_sum[r][p] = NAME(mac)(block_sum[r][p], w[p], unit);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      prefetch(scales + ((p + P) * blocks + block) * LANES);
      F32x16 scale = f32_load(scales + (p * blocks + block) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += block_sum[r][p] * scale;
    }
  }
}
#endif

// x [n], y [n]. The sum of x * y.
INLINE float NAME(dot)(const ELEMENT *x, const ELEMENT *y, long n) {
  const long step = LANES * PER_UNIT;
  F32x16 acc = {0};
  for (long i = 0; i < n; i += step) {
    long bytes = min_long(n - i, step) * (long)sizeof(ELEMENT);
    acc = NAME(mac)(acc, load_partial(x + i, bytes), load_partial(y + i, bytes));
  }
  return sum_lanes(acc);
}

// Recomputes y of one row at the columns of [panel, panel + panels) whose row of W the site replaces.
static void NAME(replace_columns)(const NAME(ProductTask) *task, const Site *site, long row, long panel,
                                  long panels) {
  const Weight *w = task->weight;
  float *y = task->y + row * task->y_stride;
  for (long j = first_replaced_row(site, panel * LANES); j < site->row_count; j++) {
    long column = site->row_ids[j];
    if (column >= (panel + panels) * LANES) return;
    y[column] = NAME(dot)(task->x + row * task->x_stride, (const ELEMENT *)site->rows + j * w->in_features,
                          w->in_features);
    if (w->bias) y[column] += w->bias[column];
  }
}

// y = output_scale * y + b h + bias of the site, for R rows of one adapter and P panels.
INLINE void NAME(add_adapter_tile)(const NAME(ProductTask) *task, const Site *site, long row, long panel,
                                   const int R, const int P) {
  long column = panel * LANES, out = task->weight->out_features;
  float *y = task->y + row * task->y_stride + column;
  F32x16 acc[8][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++)
      acc[r][p] = f32_load_partial(y + r * task->y_stride + p * LANES, out - column - p * LANES);
  if (site->output_scale)
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = (const ELEMENT *)site->output_scale + column + p * LANES;
      F32x16 scale = NAME(load_partial)(from, out - column - p * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] *= scale;
    }
  NAME(expand)(task->h + row * task->h_stride, task->h_stride, site, out, panel, R, P, acc);
  if (site->bias)
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = (const ELEMENT *)site->bias + column + p * LANES;
      F32x16 shift = NAME(load_partial)(from, out - column - p * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += shift;
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++)
      f32_store_partial(y + r * task->y_stride + p * LANES, acc[r][p], out - column - p * LANES);
}

// Applies the changes of each row's adapter to y of rows [row, row + rows) and panels [panel, panel +
// panels). Not inlined, since product_tile needs the registers.
static __attribute__((noinline)) void NAME(add_adapters)(const NAME(ProductTask) *task, long row, long rows,
                                                         long panel, long panels) {
  for (long r = 0; task->replaces_rows && r < rows; r++) {
    const Site *site = site_of(task->sites, row + r, task->module);
    if (site) NAME(replace_columns)(task, site, row + r, panel, panels);
  }
  if (rows == 8 && panels == 2 && NAME(rows_share_site)(task, row, rows)) {
    const Site *site = site_of(task->sites, row, task->module);
    if (site) NAME(add_adapter_tile)(task, site, row, panel, 8, 2);
    return;
  }
  for (long last = row + rows; row < last; row++) {
    const Site *site = site_of(task->sites, row, task->module);
    for (long p = 0; site && p < panels; p += 2)
      if (p + 2 <= panels)
        NAME(add_adapter_tile)(task, site, row, panel + p, 1, 2);
      else
        NAME(add_adapter_tile)(task, site, row, panel + p, 1, 1);
  }
}

// y = x W' + bias and the changes of adapters, for R rows from `row` on and P panels from `panel` on. Panels
// or zeros of `own` replace those of the weight; `own` may be null.
INLINE void NAME(product_tile)(const NAME(ProductTask) *task, const Site *own, long row, RowBlock row_block,
                               long panel, const int R, const int P) {
  const Weight *w = task->weight;
  PrefetchPlan plan;
  const NAME(TileRows) rows = {
      .x = task->x + row * task->x_stride,
      .x_stride = task->x_stride,
      .plan = task->sites && NAME(fill_prefetch_plan)(task, row, R, panel, &plan) ? &plan : NULL,
      .block = row_block,
  };
  F32x16 acc[8][4];
  const void *dense = own ? own->dense : NULL;
  if (w->group && !dense) {
    const float *zeros = own ? own->zeros : w->zeros;
    NAME(int4_tile)(rows, w, zeros, panel, R, P, acc);
  } else
#if PER_UNIT == 2
  if (w->scales && !dense) {
    long blocks = w->in_features / 64;
    NAME(nf4_tile)(rows, (const char *)w->panels + panel * blocks * 512, w->scales + panel * blocks * LANES,
                   blocks, R, P, acc);
  } else
#endif
  {
    long units = w->in_features / PER_UNIT;
    const char *panels = dense ? dense : w->panels;
    NAME(dense_tile)(rows, panels + panel * units * 64, units, R, P, acc);
  }
  if (w->bias)
    UNROLL for (int p = 0; p < P; p++) {
      long column = (panel + p) * LANES;
      F32x16 bias = f32_load_partial(w->bias + column, w->out_features - column);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += bias;
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) {
      long column = (panel + p) * LANES;
      f32_store_partial(task->y + (row + r) * task->y_stride + column, acc[r][p], w->out_features - column);
    }
  if (task->sites) NAME(add_adapters)(task, row, R, panel, P);
}

#define MULTIPLY_TILES(R, P, from, to)                            \
  for (long panel = from; panel < to;) {                          \
    if (panel + P <= to) {                                        \
      NAME(product_tile)(task, own, row, row_block, panel, R, P); \
      panel += P;                                                 \
    } else {                                                      \
      NAME(product_tile)(task, own, row, row_block, panel, R, 1); \
      panel++;                                                    \
    }                                                             \
  }

#define REMAINDER(R, P) \
  case R: MULTIPLY_TILES(R, P, first, last) break;

// Computes y of rows [row, stop) and panels [first, last). Two panels are multiplied by all blocks of eight
// rows while they are cached. The remaining rows are one tile, since each tile decodes the weight again.
static void NAME(multiply_panels)(const NAME(ProductTask) *task, const Site *own, long row, long stop,
                                  long first, long last) {
  long start = row, eights = row + (stop - row) / 8 * 8;
  RowBlock row_block = {0, (stop - row) / 8};
  for (long pair = first; pair < last; pair += 2) {
    long end = pair + 2 < last ? pair + 2 : last;
    row_block.index = 0;
    for (row = start; row < eights; row += 8, row_block.index++) MULTIPLY_TILES(8, 2, pair, end)
  }
  row = eights;
  row_block = (RowBlock){0, 1};
  switch (stop - row) {
    REMAINDER(7, 2)
    REMAINDER(6, 2)
    REMAINDER(5, 2)
    REMAINDER(4, 2)
    REMAINDER(3, 2)
    REMAINDER(2, 4)
    REMAINDER(1, 4)
  }
}
#undef REMAINDER
#undef MULTIPLY_TILES
