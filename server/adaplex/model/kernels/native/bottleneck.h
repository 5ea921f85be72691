// Included once for each element type: bottlenecks, y += b f(a x + inner) + bias, of the adapter of each
// row, at what attention or the MLP gives before it joins the residual stream.

// h = f(h + inner).
static void NAME(bend)(const Site *site, ELEMENT *h) {
  const ELEMENT *inner = site->inner;
  for (long i = 0; i < site->rank; i += LANES) {
    long left = site->rank - i;
    vec x = NAME(load_part)(h + i, left);
    if (inner) x += NAME(load_part)(inner + i, left);
    NAME(store_part)(h + i, activate(x, site->shape % 16), left);
  }
}

// What the bottlenecks of some rows of a site read, [rows, hidden], at times copied to `to`.
static const ELEMENT *NAME(read_rows)(const Work_space *space, const NAME(Part) * block, long reads,
                                      long start, long rows, ELEMENT *to) {
  long hidden = block->weight->out;
  if (reads == READ_INPUT) return (const ELEMENT *)space->normed + start * hidden;
  for (long row = start; row < start + rows; row++, to += hidden) {
    const float *y = block->y + row * block->y_stride, *residual = space->residual + row * hidden;
    for (long i = 0; i < hidden; i += LANES) {
      vec x = {0};
      if (reads != READ_RESIDUAL) x += f32_load_part(y + i, hidden - i);
      if (reads != READ_OUTPUT) x += f32_load_part(residual + i, hidden - i);
      NAME(store_part)(to + i, x, hidden - i);
    }
  }
  return to - rows * hidden;
}

// All bottlenecks at the `module` of a block; `last` is its last product. A ticket is a few rows.
static void NAME(bottlenecks)(Member *me, const NAME(Task) * task, const NAME(Part) * last, long module) {
  const Step *step = task->step;
  long hidden = task->model->hidden, panels = (hidden + LANES - 1) / LANES;
  long tickets = rank_passes(me->passes, &module, 1, step->run, step->runs, READ_ROWS);
  if (!tickets) return;

  NAME(Part) block = *last;
  block.module = module;
  const Pass *pass = me->passes;
  for (long ticket; (ticket = team_next(&me->draw, tickets)) >= 0;) {
    pass = pass_of(me->passes, pass, ticket);
    long start = pass->start + (ticket - pass->first_ticket) * READ_ROWS;
    long rows = at_most(pass->stop - start, READ_ROWS);
    const Site *site = site_of(block.sites, start, module);
    const ELEMENT *x = NAME(read_rows)(&task->space, &block, site->shape / 16, start, rows, me->read);
    ELEMENT *h = block.h + start * block.h_stride;
    NAME(shrink)(x, hidden, hidden, site->a, site->rank, rows, h, block.h_stride);
    for (long r = 0; r < rows; r++) NAME(bend)(site, h + r * block.h_stride);
    for (long panel = 0; panel < panels; panel += 2)
      NAME(add_adapters)(&block, start, rows, panel, at_most(panels - panel, 2));
  }
}
