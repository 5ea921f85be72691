// Included once for each element type: products by themselves, for layers outside of the decoder.

typedef struct {
  const Weight *weight;
  const ELEMENT *x;
  long x_stride, rows;
  float *wide;
  ELEMENT *y;
  long y_stride;
} NAME(Product);

static void NAME(multiply)(void *context, int thread) {
  const NAME(Product) *p = context;
  const Weight *w = p->weight;
  long base = 0, panels = (w->out + LANES - 1) / LANES;
  (void)thread;
  for (long group; (group = team_next(&base, panel_groups(w))) >= 0;) {
    long first = group * PANEL_GROUP, last = first + PANEL_GROUP;
    if (last > panels) last = panels;
    NAME(panels)(w, NULL, p->x, p->x_stride, p->rows, first, last, p->wide, w->out);
    long from = first * LANES, to = last * LANES < w->out ? last * LANES : w->out;
    for (long row = 0; row < p->rows; row++) {
      float *wide = p->wide + row * w->out;
      for (long n = from; w->bias && n < to; n++) wide[n] += w->bias[n];
      NAME(narrow_row)(wide + from, to - from, p->y + row * p->y_stride + from);
    }
  }
}

// y = x W' + bias. x [rows, in], y [rows, out], strides in elements.
int NAME(linear)(const Weight *weight, const ELEMENT *x, int64_t x_stride, int64_t rows, ELEMENT *y,
                 int64_t y_stride) {
  float *wide = aligned_alloc(64, (sizeof(float) * (size_t)(rows * weight->out) + 63) / 64 * 64);
  if (!wide) return NO_MEMORY;
  NAME(Product) product = {weight, x, x_stride, rows, wide, y, y_stride};
  team_run(NAME(multiply), &product);
  free(wide);
  return DONE;
}

// y[row] += b (a x[row]) for every row of every span. x [rows, in] and y [rows, out]; spans is
// [count][start, stop); sites the line of each span's adapter at this module.
int NAME(low_rank)(const ELEMENT *x, int64_t x_stride, int64_t in, ELEMENT *y, int64_t y_stride,
                   int64_t out, const int64_t *spans, const Site *const *sites, int64_t count) {
  long widest = 0;
  for (long s = 0; s < count; s++) widest = at_least(widest, sites[s]->rank);
  if (!widest) return DONE;
  float *h = malloc(sizeof(float) * BLOCK_ROWS * (size_t)(widest + out));
  if (!h) return NO_MEMORY;
  float *wide = h + BLOCK_ROWS * widest;
  for (long s = 0; s < count; s++) {
    const Site *site = sites[s];
    for (long row = spans[2 * s]; site->rank && row < spans[2 * s + 1];) {
      long rows = spans[2 * s + 1] - row >= BLOCK_ROWS ? BLOCK_ROWS : 1;
      ELEMENT *target = y + row * y_stride;
      NAME(shrink)(x + row * x_stride, x_stride, in, site->a, site->rank, rows, h, widest);
      for (long r = 0; r < rows; r++) NAME(widen_row)(target + r * y_stride, out, wide + r * out);
      NAME(expand)(h, widest, site->rank, site->b, out, 0, out, rows, wide, out);
      for (long r = 0; r < rows; r++) NAME(narrow_row)(wide + r * out, out, target + r * y_stride);
      row += rows;
    }
  }
  free(h);
  return DONE;
}
