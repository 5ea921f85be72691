// Included once for each element type: bottlenecks, y += b f(a x + inner) + bias, by the adapter of each row,
// where y is the output of attention or the MLP before it is added to the residual stream.

// h [rank]. h = f(h + inner).
static void NAME(activate_bottleneck)(const Site *site, ACTIVATION *h) {
  const ELEMENT *inner = site->inner;
  for (long i = 0; i < site->rank; i += VEC_LANES) {
    long left = site->rank - i;
    VecF32 x = ACT(load_partial)(h + i, left);
    if (inner) x += NAME(load_partial)(inner + i, left);
    ACT(store_partial)(h + i, activate_lanes(x, site->shape % 16), left);
  }
}

// to [rows, hidden]. The inputs [rows, hidden] of the bottlenecks of rows [start, start + rows), either in
// `to` or where they already are; `reads` numbers the kind of input.
static const ACTIVATION *NAME(bottleneck_input)(const Workspace *space, const NAME(ProductTask) *block,
                                             long reads, long start, long rows,
                                               ACTIVATION *to) {
  long hidden = block->weight->out_features;
  if (reads == READ_INPUT) return (const ACTIVATION *)space->normed + start * hidden;
  for (long row = start; row < start + rows; row++, to += hidden) {
    const float *y = block->y + row * block->y_stride, *residual = space->residual + row * hidden;
    for (long i = 0; i < hidden; i += VEC_LANES) {
      VecF32 x = {0};
      if (reads != READ_RESIDUAL) x += f32_load_partial(y + i, hidden - i);
      if (reads != READ_OUTPUT) x += f32_load_partial(residual + i, hidden - i);
      ACT(store_partial)(to + i, x, hidden - i);
    }
  }
  return to - rows * hidden;
}

// Adds all bottlenecks at the `module` of a block, -1 for none, whose last product is `last`. A ticket is up
// to READ_ROWS rows of one adapter.
static void NAME(add_bottlenecks)(ThreadContext *me, const NAME(StepTask) *task,
                                  const NAME(ProductTask) *last, long module) {
  if (module < 0) return;
  const Step *step = task->step;
  long hidden = task->model->hidden, panels = (hidden + PANEL - 1) / PANEL;
  long tickets = rank_ranges(me->ranges, &module, 1, step->run, step->runs, READ_ROWS);
  if (!tickets) return;

  NAME(ProductTask) block = *last;
  block.module = module;
  const TicketRange *range = me->ranges;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, tickets)) >= 0;) {
    range = range_of_ticket(me->ranges, range, ticket);
    long start = range->start + (ticket - range->first_ticket) * READ_ROWS;
    long rows = min_long(range->stop - start, READ_ROWS);
    const Site *site = site_of(block.sites, start, module);
    const ACTIVATION *x =
        NAME(bottleneck_input)(&task->space, &block, site->shape / 16, start, rows, me->bottleneck_input);
    ACTIVATION *h = block.h + start * block.h_stride;
    const NAME(ShrinkTask) shrink = {.x = x,
                                     .x_stride = hidden,
                                     .in_features = hidden,
                                     .a = site->a,
                                     .rank = site->rank,
                                     .h = h,
                                     .h_stride = block.h_stride};
    NAME(shrink)(&shrink, rows);
    for (long r = 0; r < rows; r++) NAME(activate_bottleneck)(site, h + r * block.h_stride);
    for (long panel = 0; panel < panels; panel += 2)
      NAME(add_adapters)(&block, start, rows, panel, min_long(panels - panel, 2));
  }
}
