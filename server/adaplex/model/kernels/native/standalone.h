// Included once for each element type: the library's functions for layers outside of the decoder.

// A product of `rows` rows, whose fp32 outputs are narrowed to y [rows, out], rows y_stride apart.
typedef struct {
  NAME(ProductTask) task;
  const ELEMENT *x;  // [rows, in], rows x_stride apart
  long x_stride, rows;
  ELEMENT *y;
  long y_stride;
} NAME(LinearCall);

// Work of one thread of the team; `context` is a LinearCall. A ticket is a row if activations are no
// elements, a row that is quantized if the weight has int8_inputs, then a group of panels.
static void NAME(linear_on_thread)(void *context, int thread) {
  const NAME(LinearCall) *call = context;
  const Weight *w = call->task.weight;
  long panels = panel_count(w);
  TicketCursor cursor = {.thread = thread};
  if ((const void *)call->task.x != call->x)
    for (long row; (row = team_next_ticket(&cursor, call->rows)) >= 0;)
      NAME(activation_row)(call->x + row * call->x_stride, w->in_features,
                           (ACTIVATION *)call->task.x + row * w->in_features);
  if (w->int8_inputs)
    for (long row; (row = team_next_ticket(&cursor, call->rows)) >= 0;)
      NAME(quantize_row)(call->task.x + row * call->task.x_stride, w->in_features, call->task.quantized, row);
  for (long group; (group = team_next_ticket(&cursor, panel_group_count(w))) >= 0;) {
    long first = group * PANEL_GROUP, last = min_long(first + PANEL_GROUP, panels);
    NAME(multiply_panels)(&call->task, NULL, 0, call->rows, first, last);
    long from = first * PANEL, to = min_long(last * PANEL, w->out_features);
    for (long row = 0; row < call->rows; row++)
      NAME(narrow_row)(call->task.y + row * w->out_features + from, to - from,
                       call->y + row * call->y_stride + from);
  }
}

// x [rows, in], y [rows, out], strides in elements. y = x W' + bias. Returns DONE or NO_MEMORY.
int NAME(linear)(const Weight *weight, const ELEMENT *x, int64_t x_stride, int64_t rows, ELEMENT *y,
                 int64_t y_stride) {
  const int converts = sizeof(ELEMENT) != sizeof(ACTIVATION);
  size_t wide = sizeof(float) * (size_t)(rows * weight->out_features);
  size_t inputs = converts ? sizeof(ACTIVATION) * (size_t)(rows * weight->in_features) : 0;
  size_t quantized = weight->int8_inputs ? quantized_bytes(rows, weight->in_features) : 0;
  float *buffer = aligned_alloc(64, (wide + inputs + quantized + 63) / 64 * 64);
  if (!buffer) return NO_MEMORY;
  NAME(ProductTask) task = {
      .weight = weight,
      .x = converts ? (const ACTIVATION *)(buffer + rows * weight->out_features) : (const void *)x,
      .x_stride = converts ? weight->in_features : x_stride,
      .y = buffer,
      .y_stride = weight->out_features};
  if (quantized)
    task.quantized = quantized_rows((char *)buffer + wide + inputs, rows, weight->in_features);
  NAME(LinearCall) call = {task, x, x_stride, rows, y, y_stride};
  team_run(NAME(linear_on_thread), &call);
  free(buffer);
  return DONE;
}

// h [rank], y [out]. y += b h.
static void NAME(add_low_rank_row)(const ACTIVATION *h, const Site *site, long out, ELEMENT *y) {
  for (long n = 0; n < out; n += PANEL) {
    float wide[PANEL];
    long width = min_long(out - n, PANEL);
    NAME(widen_row)(y + n, width, wide);
    Tile acc;
    for (int v = 0; v < PANEL_VECS; v++)
      acc[0][v] = f32_load_partial(wide + v * VEC_LANES, width - v * VEC_LANES);
    NAME(expand)(h, 0, site, out, n / PANEL, 1, 1, acc);
    for (int v = 0; v < PANEL_VECS; v++) f32_store(wide + v * VEC_LANES, acc[0][v]);
    NAME(narrow_row)(wide, width, y + n);
  }
}

// x [rows, in], y [rows, out], strides in elements; spans [count, 2]: start and stop; sites [count]: the site
// of each span's adapter. y[row] += b (a x[row]) for every row of every span. Returns DONE or NO_MEMORY.
int NAME(low_rank)(const ELEMENT *x, int64_t x_stride, int64_t in, ELEMENT *y, int64_t y_stride, int64_t out,
                   const int64_t *spans, const Site *const *sites, int64_t count) {
  long widest = 0;
  for (long s = 0; s < count; s++) widest = max_long(widest, sites[s]->rank);
  if (!widest) return DONE;
  const int converts = sizeof(ELEMENT) != sizeof(ACTIVATION);
  long stride = widest + widest % PER_UNIT;
  ACTIVATION *h = malloc(sizeof(ACTIVATION) * BLOCK_ROWS * (size_t)(stride + (converts ? in : 0)));
  if (!h) return NO_MEMORY;
  ACTIVATION *inputs = h + BLOCK_ROWS * stride;
  for (long s = 0; s < count; s++)
    for (long row = spans[2 * s]; sites[s]->rank && row < spans[2 * s + 1];) {
      long rows = spans[2 * s + 1] - row >= BLOCK_ROWS ? BLOCK_ROWS : 1;
      for (long r = 0; converts && r < rows; r++)
        NAME(activation_row)(x + (row + r) * x_stride, in, inputs + r * in);
      const NAME(ShrinkTask) shrink = {.x = converts ? inputs : (const void *)(x + row * x_stride),
                                       .x_stride = converts ? in : x_stride,
                                       .in_features = in,
                                       .a = sites[s]->a,
                                       .rank = sites[s]->rank,
                                       .h = h,
                                       .h_stride = stride};
      NAME(shrink)(&shrink, rows);
      for (long r = 0; r < rows; r++)
        NAME(add_low_rank_row)(h + r * stride, sites[s], out, y + (row + r) * y_stride);
      row += rows;
    }
  free(h);
  return DONE;
}
