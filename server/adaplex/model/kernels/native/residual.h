// Included once for each element type: the residual stream, from tokens on, and its norms.

// The embedding [hidden] of a token: of a virtual token, a row that the adapter replaces, or a row of the
// adapter's or the base's table.
static const ELEMENT *NAME(embedding_row)(const Model *m, const Site *site, long token) {
  if (token < 0) return (const ELEMENT *)site->virtual + (-1 - token) * m->hidden;
  const ELEMENT *table = m->embedding;
  if (site) {
    long j = first_replaced_row(site, token);
    if (j < site->row_count && site->row_ids[j] == token) return (const ELEMENT *)site->rows + j * m->hidden;
    if (site->dense) table = site->dense;
  }
  return table + token * m->hidden;
}

// y += b a[token], for one row.
static void NAME(add_embedding_delta)(const NAME(ProductTask) *table, const Site *site, long row,
                                      long token) {
  ACTIVATION *h = table->h + row * table->h_stride;
  long panels = panel_count(table->weight);
  NAME(activation_row)((const ELEMENT *)site->a + token * site->rank, site->rank, h);
  for (long j = site->rank; j % PER_UNIT; j++) h[j] = 0;
  for (long panel = 0; panel < panels; panel += 2)
    NAME(add_adapters)(table, row, 1, panel, min_long(panels - panel, 2));
}

// normed[row] = norm of residual[row].
static void NAME(norm_residual_row)(const NAME(StepTask) *task, long row, const Norm *norm) {
  const Workspace *space = &task->space;
  long hidden = task->model->hidden;
  NAME(norm_row)(space->residual + row * hidden, norm, site_of_norm(space->sites, row, norm), hidden,
                 (ACTIVATION *)space->normed + row * hidden);
}

// x [hidden]. Scales the embedding of a token and adds that of its position, in place; virtual tokens are
// not scaled.
static void NAME(place_embedding)(const Model *m, float *x, long token, long position) {
  const float scale = token < 0 ? 1.0f : (float)m->embedding_scale;
  const ELEMENT *place = m->position_embedding;
  if (scale != 1.0f)
    for (long i = 0; i < m->hidden; i++) x[i] *= scale;
  if (place)
    for (long i = 0; i < m->hidden; i++) x[i] += NAME(widen)(place[position * m->hidden + i]);
}

// Fills in the residual stream with the embeddings of the tokens, and norms it for the first layer. A ticket
// is a row.
static void NAME(embed_tokens)(ThreadContext *me, const NAME(StepTask) *task) {
  const Model *m = task->model;
  const Workspace *space = &task->space;
  const Weight shape = {.out_features = m->hidden};
  const NAME(ProductTask) table = {.weight = &shape,
                                   .y = space->residual,
                                   .y_stride = m->hidden,
                                   .sites = space->sites,
                                   .module = m->embedding_module,
                                   .h = space->shrunk,
                                   .h_stride = space->rank_stride};
  for (long row; (row = team_next_ticket(&me->cursor, task->step->rows)) >= 0;) {
    float *residual = space->residual + row * m->hidden;
    long token = task->step->tokens[row];
    const Site *site = site_of(space->sites, row, m->embedding_module);
    NAME(widen_row)(NAME(embedding_row)(m, site, token), m->hidden, residual);
    if (site && site->rank && token >= 0) NAME(add_embedding_delta)(&table, site, row, token);
    NAME(place_embedding)(m, residual, token, task->step->position[row]);
    NAME(norm_residual_row)(task, row, &m->layer->attention_norm);
  }
}

// residual += y of a product, by the norm `out` if the layer has it; then norms the sum for the next phase
// unless `next` is null. A ticket is a row.
static void NAME(add_residual_and_norm)(ThreadContext *me, const NAME(StepTask) *task,
                                        const NAME(ProductTask) *product, const Norm *out, const Norm *next) {
  const Workspace *space = &task->space;
  long hidden = task->model->hidden;
  for (long row; (row = team_next_ticket(&me->cursor, task->step->rows)) >= 0;) {
    float *residual = space->residual + row * hidden, *y = product->y + row * product->y_stride;
    if (out->weight) NAME(norm_in_place)(y, out, site_of_norm(space->sites, row, out), hidden);
    for (long i = 0; i < hidden; i++) residual[i] += y[i];
    if (next) NAME(norm_residual_row)(task, row, next);
  }
}
