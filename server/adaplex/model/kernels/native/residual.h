// Included once for each element type: the residual stream, from tokens on, and its norms.

// What stands for a token: a virtual one, a row that the adapter replaces, or a row of its table.
static const ELEMENT *NAME(token_row)(const Model *m, const Site *site, long token) {
  if (token < 0) return (const ELEMENT *)site->virtual + (-1 - token) * m->hidden;
  const ELEMENT *table = m->embedding;
  if (site) {
    long j = first_row(site, token);
    if (j < site->row_count && site->row_ids[j] == token)
      return (const ELEMENT *)site->rows + j * m->hidden;
    if (site->dense) table = site->dense;
  }
  return table + token * m->hidden;
}

// y += b a[token], of one row.
static void NAME(add_lookup)(const NAME(Part) * table, const Site *site, long row, long token) {
  ELEMENT *h = table->h + row * table->h_stride;
  long panels = panels_of(table->weight);
  memcpy(h, (const ELEMENT *)site->a + token * site->rank, sizeof(ELEMENT) * (size_t)site->rank);
  for (long j = site->rank; j % PER_UNIT; j++) h[j] = 0;
  for (long panel = 0; panel < panels; panel += 2)
    NAME(add_adapters)(table, row, 1, panel, at_most(panels - panel, 2));
}

// Norms a row for what comes next, by a norm of this module.
static void NAME(norm)(const NAME(Task) * task, long row, const float *norm, long module) {
  const Work_space *space = &task->space;
  long hidden = task->model->hidden;
  NAME(norm_row)(space->residual + row * hidden, norm, site_of(space->sites, row, module), hidden,
                 task->model->epsilon, (ELEMENT *)space->normed + row * hidden);
}

// Tokens to the residual stream, normed for the first layer. A ticket is a row.
static void NAME(embed)(Member *me, const NAME(Task) * task) {
  const Model *m = task->model;
  const Work_space *space = &task->space;
  const Weight shape = {.out = m->hidden};
  const NAME(Part) table = {.weight = &shape,
                            .y = space->residual,
                            .y_stride = m->hidden,
                            .sites = space->sites,
                            .module = m->embedding_module,
                            .h = space->low,
                            .h_stride = space->rank_stride};
  for (long row; (row = team_next(&me->draw, task->step->rows)) >= 0;) {
    float *residual = space->residual + row * m->hidden;
    long token = task->step->tokens[row];
    const Site *site = site_of(space->sites, row, m->embedding_module);
    NAME(widen_row)(NAME(token_row)(m, site, token), m->hidden, residual);
    if (site && site->rank && token >= 0) NAME(add_lookup)(&table, site, row, token);
    NAME(norm)(task, row, m->layer[0].attention_norm, m->layer[0].modules[ATTENTION_NORM]);
  }
}

// Adds a product to the residual stream, and norms the sum for what comes next.
static void NAME(settle)(Member *me, const NAME(Task) * task, const NAME(Part) * part, const float *norm,
                         long module) {
  long hidden = task->model->hidden;
  for (long row; (row = team_next(&me->draw, task->step->rows)) >= 0;) {
    float *residual = task->space.residual + row * hidden;
    const float *y = part->y + row * part->y_stride;
    for (long i = 0; i < hidden; i++) residual[i] += y[i];
    if (norm) NAME(norm)(task, row, norm, module);
  }
}
