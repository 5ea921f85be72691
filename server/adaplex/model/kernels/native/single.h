// Included once for each element type: products by themselves, for layers outside of the decoder.

typedef struct {
  NAME(Part) part;
  long rows;
  ELEMENT *y;
  long y_stride;
} NAME(Product);

static void NAME(multiply)(void *context, int thread) {
  const NAME(Product) *p = context;
  const Weight *w = p->part.weight;
  long panels = panels_of(w);
  Draw draw = {.thread = thread};
  for (long group; (group = team_next(&draw, panel_groups(w))) >= 0;) {
    long first = group * PANEL_GROUP, last = at_most(first + PANEL_GROUP, panels);
    NAME(panels)(&p->part, NULL, 0, p->rows, first, last);
    long from = first * LANES, to = at_most(last * LANES, w->out);
    for (long row = 0; row < p->rows; row++)
      NAME(narrow_row)(p->part.y + row * w->out + from, to - from, p->y + row * p->y_stride + from);
  }
}

// y = x W' + bias. x [rows, in], y [rows, out], strides in elements.
int NAME(linear)(const Weight *weight, const ELEMENT *x, int64_t x_stride, int64_t rows, ELEMENT *y,
                 int64_t y_stride) {
  float *wide = aligned_alloc(64, (sizeof(float) * (size_t)(rows * weight->out) + 63) / 64 * 64);
  if (!wide) return NO_MEMORY;
  NAME(Part) part = {.weight = weight, .x = x, .x_stride = x_stride, .y = wide, .y_stride = weight->out};
  NAME(Product) product = {part, rows, y, y_stride};
  team_run(NAME(multiply), &product);
  free(wide);
  return DONE;
}

// y += b h, of one row.
static void NAME(add_delta)(const ELEMENT *h, const Site *site, long out, ELEMENT *y) {
  for (long n = 0; n < out; n += LANES) {
    vec acc[8][4];
    float wide[LANES];
    long width = at_most(out - n, LANES);
    NAME(widen_row)(y + n, width, wide);
    acc[0][0] = f32_load_part(wide, width);
    NAME(expand)(h, 0, site, out, n / LANES, 1, 1, acc);
    f32_store(wide, acc[0][0]);
    NAME(narrow_row)(wide, width, y + n);
  }
}

// y[row] += b (a x[row]) for every row of every span. x [rows, in] and y [rows, out]; spans is
// [count][start, stop); sites the line of each span's adapter at this module.
int NAME(low_rank)(const ELEMENT *x, int64_t x_stride, int64_t in, ELEMENT *y, int64_t y_stride,
                   int64_t out, const int64_t *spans, const Site *const *sites, int64_t count) {
  long widest = 0;
  for (long s = 0; s < count; s++) widest = at_least(widest, sites[s]->rank);
  if (!widest) return DONE;
  long stride = widest + widest % PER_UNIT;
  ELEMENT *h = malloc(sizeof(ELEMENT) * BLOCK_ROWS * (size_t)stride);
  if (!h) return NO_MEMORY;
  for (long s = 0; s < count; s++)
    for (long row = spans[2 * s]; sites[s]->rank && row < spans[2 * s + 1];) {
      long rows = spans[2 * s + 1] - row >= BLOCK_ROWS ? BLOCK_ROWS : 1;
      NAME(shrink)(x + row * x_stride, x_stride, in, sites[s]->a, sites[s]->rank, rows, h, stride);
      for (long r = 0; r < rows; r++)
        NAME(add_delta)(h + r * stride, sites[s], out, y + (row + r) * y_stride);
      row += rows;
    }
  free(h);
  return DONE;
}
