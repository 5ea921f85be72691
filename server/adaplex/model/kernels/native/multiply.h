// Included once for each element type: a product of any number of rows, in tiles.

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

#define REMAINDER(R) \
  case R: MULTIPLY_TILES(R, TILE_PANELS(R), first, last) break;

#if VEC_LANES == PANEL
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
    REMAINDER(7)
    REMAINDER(6)
    REMAINDER(5)
    REMAINDER(4)
    REMAINDER(3)
    REMAINDER(2)
    REMAINDER(1)
  }
}
#else
// Prefetches line `line` of the panel of b of each of the rows [row, row + rows).
static void NAME(prefetch_b)(const NAME(ProductTask) *task, long row, long rows, long panel, long line) {
  for (long last = row + rows; row < last; row++) {
    const Site *site = site_of(task->sites, row, task->module);
    if (!site || line * 64 >= site->rank * PANEL * (long)sizeof(ELEMENT)) continue;
    prefetch(NAME(b_panels)(task, row, panel) + line * 64);
  }
}

// Writes y of a chunk's rows from their sums, for one panel, and applies the changes of adapters.
static void NAME(finish_chunk)(const NAME(ProductTask) *task, long row, long rows, long panel,
                               const float (*sums)[PANEL]) {
  const Weight *w = task->weight;
  UNROLL for (int v = 0; v < PANEL_VECS; v++) {
    long column = panel * PANEL + v * VEC_LANES, left = w->out_features - column;
    VecF32 bias = w->bias ? f32_load_partial(w->bias + column, left) : (VecF32){0};
    for (long r = 0; r < rows; r++) {
      VecF32 y = f32_load(sums[r] + v * VEC_LANES);
      f32_store_partial(task->y + (row + r) * task->y_stride + column, w->bias ? y + bias : y, left);
    }
  }
  if (task->sites) NAME(add_adapters)(task, row, rows, panel, 1);
}

// Computes y of rows [row, row + rows), at most CHUNK_ROWS, and panels [first, last), at most PANEL_GROUP.
static void NAME(multiply_chunk)(const NAME(ProductTask) *task, const Site *own, long row, long rows,
                                 long first, long last) {
  const Weight *w = task->weight;
  const char *dense = own && own->dense ? own->dense : w->scales ? NULL : w->panels;
  const float *own_zeros = own ? own->zeros : w->zeros;
  const int nf4 = !w->group;
  const long in = w->in_features, group = dense ? in : nf4 ? NF4_GROUP : w->group;
  _Alignas(64) float decoded[BLOCK_INPUTS * PANEL];
  float minus_sums[CHUNK_ROWS];
  ChunkSums sums[PANEL_GROUP];
  for (long p = 0; p < last - first; p++) memset(sums[p].total, 0, sizeof sums[p].total[0] * (size_t)rows);
  for (long at = 0, inputs; at < in; at += inputs) {
    const long place = at / group, start = place * group;
    inputs = min_long(BLOCK_INPUTS, start + group - at);
    DecodedBlock block = {.weights = decoded,
                          .inputs = inputs,
                          .from_zero = at == start,
                          .ends_group = !dense && at + inputs == start + group,
                          .nf4 = nf4};
    const float *x = task->x + row * task->x_stride + at;
    if (block.ends_group && !nf4) {
      const float *of_group = task->x + row * task->x_stride + start;
      for (long r = 0; r < rows; r++)
        pair_minus_sums(of_group + r * task->x_stride, 0, group, 1, minus_sums + r);
      block.minus_sums = minus_sums;
    }
    for (long panel = first; panel < last; panel++) {
#if PER_UNIT == 1
      if (dense) block.weights = (const float *)dense + (panel * in + at) * PANEL;
#else
      if (dense) decode_bf16(dense + (panel * in + at) * PANEL * 2, inputs, decoded);
#endif
      if (!dense)
        decode_codes(nf4 ? &NF4 : &INT4, (const char *)w->panels + (panel * in + at) * 8, inputs, decoded);
      for (int v = 0; block.ends_group && v < PANEL_VECS; v++)
        block.scale[v] = group_scale(w, nf4, own_zeros, panel * (in / group) + place, v);
      if (task->sites) NAME(prefetch_b)(task, row, rows, panel, at / BLOCK_INPUTS);
      multiply_decoded_block(&block, x, task->x_stride, sums + panel - first, rows);
    }
  }
  for (long panel = first; panel < last; panel++) {
    const ChunkSums *done = sums + panel - first;
    NAME(finish_chunk)(task, row, rows, panel, dense ? done->part : done->total);
  }
}

// Computes y of rows [row, stop) and panels [first, last), at most PANEL_GROUP. Few rows are one tile; more
// are multiplied by decoded blocks.
static void NAME(multiply_panels)(const NAME(ProductTask) *task, const Site *own, long row, long stop,
                                  long first, long last) {
  RowBlock row_block = {0, 1};
  const int integers = task->weight->int8_inputs && !(own && own->dense);
  if (stop - row > TILE_ROWS && !integers) {
    for (; row < stop; row += CHUNK_ROWS)
      NAME(multiply_chunk)(task, own, row, min_long(CHUNK_ROWS, stop - row), first, last);
    return;
  }
  // Tiles of integers decode so fast that they share no decoded blocks.
  for (; stop - row > TILE_ROWS; row += TILE_ROWS)
    MULTIPLY_TILES(TILE_ROWS, TILE_PANELS(TILE_ROWS), first, last)
  switch (stop - row) {
#if TILE_ROWS > 2
    REMAINDER(4)
    REMAINDER(3)
#endif
    REMAINDER(2)
    REMAINDER(1)
  }
}
#endif
#undef REMAINDER
#undef MULTIPLY_TILES
