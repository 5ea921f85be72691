// Included once for each element type: one tile of a product, with the changes of adapters.

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
  const int at_once = CODE_PANELS(R) < P ? CODE_PANELS(R) : P;
  Tile acc;
  const void *dense = own ? own->dense : NULL;
  const float *zeros = own ? own->zeros : w->zeros;
  if (w->int8_inputs && !dense) {
    const IntegerTile tile = {.weight = w,
                              .zeros = zeros,
                              .panel = panel,
                              .rows = quantized_from(task->quantized, row, w->in_features),
                              .plan = rows.plan,
                              .block = row_block};
    Tile sums;
    multiply_integers(&tile, R, P, sums);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < P * PANEL_VECS; v++) acc[r][v] = sums[r][v];
  } else if (w->group && !dense) {
    UNROLL for (int p = 0; p < P; p += at_once)
      NAME(code_tile)(rows, w, 0, zeros, panel + p, R, at_once, acc, p * PANEL_VECS);
#if PER_UNIT == 2
  } else if (w->scales && !dense) {
    UNROLL for (int p = 0; p < P; p += at_once)
      NAME(code_tile)(rows, w, 1, NULL, panel + p, R, at_once, acc, p * PANEL_VECS);
#endif
  } else {
    long units = w->in_features / PER_UNIT;
    const char *panels = dense ? dense : w->panels;
    NAME(dense_tile)(rows, panels + panel * units * 64, units, R, P, acc);
  }
  UNROLL for (int v = 0; v < P * PANEL_VECS; v++) {
    long column = panel * PANEL + v * VEC_LANES, left = w->out_features - column;
    VecF32 bias = w->bias ? f32_load_partial(w->bias + column, left) : (VecF32){0};
    UNROLL for (int r = 0; r < R; r++) {
      if (w->bias) acc[r][v] += bias;
      f32_store_partial(task->y + (row + r) * task->y_stride + column, acc[r][v], left);
    }
  }
  if (task->sites) NAME(add_adapters)(task, row, R, panel, P);
}
