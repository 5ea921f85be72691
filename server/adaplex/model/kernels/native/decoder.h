// Included once for each element type: one step of a llama-shaped decoder, all layers in one call.
//
// Every thread of the team runs `run_layers`. Each phase is a round of tickets (team.h), which ends for all
// threads together.

// products [3]: q, k and v. Applies head norms and rotary embeddings to queries and keys, stores queries in
// `query` and keys and values in the cache. A ticket is ROW_GROUP rows; one head of them if tickets are few.
static void NAME(rope_and_store_kv)(ThreadContext *me, const NAME(StepTask) *task, const Layer *layer,
                                    const NAME(ProductTask) *products) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  long dim = m->head_dim, all = m->heads + m->kv_heads;
  long groups = row_group_count(step->rows), split = groups >= 4 * team.threads ? 1 : all;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = min_long(start + ROW_GROUP, step->rows);
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? all : from + 1;
    for (long head = from; head < to; head++) {
      int is_key = head >= m->heads;
      const NAME(ProductTask) *product = products + is_key;
      long column = (is_key ? head - m->heads : head) * dim;
      const float *norm = is_key ? layer->k_norm : layer->q_norm;
      for (long row = start; row < stop; row++) {
        long at = step->position[row];
        float *x = product->y + row * product->y_stride + column;
        if (norm) {
          long module = layer->modules[is_key ? K_NORM : Q_NORM];
          NAME(rms_norm_head)(x, norm, site_of(space->sites, row, module), dim, m->epsilon);
        }
        NAME(rope_head)(x, m->cosines + at * dim / 2, m->sines + at * dim / 2, dim);
        if (!is_key) {
          // By head of keys, so that the queries that read the same keys are neighbours.
          ACTIVATION *query = (ACTIVATION *)space->query + row * m->heads * dim + head * dim;
          NAME(round_row)(x, dim, query);
          continue;
        }
        long kv = head - m->heads, size = PANEL * dim;
        long cell = kv * m->blocks + space->kv_block[row];
        NAME(store_key)((ELEMENT *)layer->keys + cell * size, at % PANEL, x, dim);
        NAME(store_value)((ELEMENT *)layer->values + cell * size, at % PANEL,
                          products[2].y + row * products[2].y_stride + column, dim);
      }
    }
  }
}

// attended = attention of `query` to the cache. A ticket is one head of keys for a QuerySpan.
static void NAME(attention)(ThreadContext *me, const NAME(StepTask) *task, const Layer *layer) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  long dim = m->head_dim, group = m->heads / m->kv_heads, width = m->heads * dim;
  const ACTIVATION *query = space->query;
  ACTIVATION *attended = space->attended;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, space->spans * m->kv_heads)) >= 0;) {
    const QuerySpan *span = space->span + ticket / m->kv_heads;
    long kv = ticket % m->kv_heads, rows = span->stop - span->start;
    ACTIVATION *q = me->query;
    for (long r = 0; r < rows; r++)
      memcpy(q + r * group * dim, query + (span->start + r) * width + kv * group * dim,
             sizeof(ACTIVATION) * (size_t)(group * dim));
    long plane = kv * m->blocks * PANEL * dim;
    NAME(HeadAttention) head = {.q = q,
                                .keys = (const ELEMENT *)layer->keys + plane,
                                .values = (const ELEMENT *)layer->values + plane,
                                .table = step->table + span->sequence * step->width,
                                .tokens = rows,
                                .group = group,
                                .dim = dim,
                                .position = step->position[span->start],
                                .window = layer->window,
                                .scale = (float)m->scale,
                                .scores = me->scores,
                                .weights = me->weights,
                                .stride = space->score_stride,
                                .weighted = me->weighted};
    NAME(attend)(&head);
    for (long r = 0; r < rows; r++)
      NAME(round_row)(me->weighted + r * group * dim, group * dim,
                       attended + (span->start + r) * width + kv * group * dim);
  }
}

// products [2]: gate and up. act = silu(gate) * up. A ticket is ROW_GROUP rows; a part of their columns if
// tickets are few.
static void NAME(silu_gate)(ThreadContext *me, const NAME(StepTask) *task,
                            const NAME(ProductTask) *products) {
  const Workspace *space = &task->space;
  long middle = task->model->middle;
  long rows = task->step->rows, groups = row_group_count(rows);
  long split = groups >= 4 * team.threads ? 1 : 4 * team.threads;
  long share = ((middle + split - 1) / split + 63) / 64 * 64;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = min_long(start + ROW_GROUP, rows);
    long from = split == 1 ? 0 : ticket % split * share;
    long to = split == 1 || from + share > middle ? middle : from + share;
    if (from >= to) continue;
    for (long row = start; row < stop; row++)
      NAME(silu_multiply_row)(products[0].y + row * products[0].y_stride + from,
                              products[1].y + row * products[1].y_stride + from, to - from,
                              (ACTIVATION *)space->act + row * middle + from);
  }
}

// Computes the logits of the wanted rows and the likeliest token of each.
static void NAME(compute_logits)(ThreadContext *me, const NAME(StepTask) *task) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  ACTIVATION *normed = space->normed;
  for (long i; (i = team_next_ticket(&me->cursor, step->wanted_rows)) >= 0;)
    NAME(rms_norm_row)(space->residual + step->wanted[i] * m->hidden, m->final_norm,
                       site_of(space->head_sites, i, m->final_norm_module), m->hidden, m->epsilon,
                       normed + i * m->hidden);
  const NAME(ProductTask) product = {.weight = &m->head,
                                     .x = normed,
                                     .x_stride = m->hidden,
                                     .y = step->logits,
                                     .y_stride = m->vocabulary,
                                     .sites = space->head_sites,
                                     .module = m->head_module,
                                     .h = space->shrunk,
                                     .h_stride = space->rank_stride,
                                     .replaces_rows = space->needs.head_rows};
  const NAME(Products) head = {{product}, 1};
  NAME(run_products)(me, space, &head, step->head_run, step->head_runs);
  for (long i; (i = team_next_ticket(&me->cursor, step->wanted_rows)) >= 0;)
    step->likeliest[i] = finite_argmax(step->logits + i * m->vocabulary, m->vocabulary);
}

// Work of one thread of the team for one step; `context` is a StepTask.
static void NAME(run_layers)(void *context, int thread) {
  const NAME(StepTask) *task = context;
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  size_t used = 0;
  char *buffer = space->thread_buffers + thread * space->thread_bytes;
  ThreadContext mine = thread_context(space, m, sizeof(ACTIVATION), thread, buffer, &used), *me = &mine;
  const Run *runs = step->run;
  long count = step->runs;

  NAME(embed_tokens)(me, task);
  for (long i = 0; i < m->layers; i++) {
    const Layer *l = m->layer + i, *next = i + 1 < m->layers ? l + 1 : NULL;
    NAME(Products) qkv = NAME(qkv_products)(task, l);
    NAME(Products) out = NAME(single_product)(task, &l->o, l->modules[O], space->attended);
    NAME(Products) gate_up = NAME(gate_up_products)(task, l);
    NAME(Products) down = NAME(single_product)(task, &l->down, l->modules[DOWN], space->act);
    NextProduct next_product[4];
    if (space->sites) {
      NAME(set_next_product)(me, &qkv, &out, step->rows, next_product);
      NAME(set_next_product)(me, &out, &gate_up, step->rows, next_product + 1);
      NAME(set_next_product)(me, &gate_up, &down, step->rows, next_product + 2);
    }
    if (space->sites && next) {
      const NAME(Products) next_qkv = NAME(qkv_products)(task, next);
      NAME(set_next_product)(me, &down, &next_qkv, step->rows, next_product + 3);
    }
    NAME(run_products)(me, space, &qkv, runs, count);
    NAME(rope_and_store_kv)(me, task, l, qkv.product);
    NAME(attention)(me, task, l);
    NAME(run_products)(me, space, &out, runs, count);
    if (space->needs.bottlenecks) NAME(add_bottlenecks)(me, task, out.product, l->modules[ATTENTION]);
    NAME(add_residual_and_norm)(me, task, out.product, l->mlp_norm, l->modules[MLP_NORM]);
    NAME(run_products)(me, space, &gate_up, runs, count);
    NAME(silu_gate)(me, task, gate_up.product);
    NAME(run_products)(me, space, &down, runs, count);
    if (space->needs.bottlenecks) NAME(add_bottlenecks)(me, task, down.product, l->modules[MLP]);
    NAME(add_residual_and_norm)(me, task, down.product, next ? next->attention_norm : NULL,
                                next ? next->modules[ATTENTION_NORM] : 0);
  }
  if (step->wanted_rows) NAME(compute_logits)(me, task);
}

// Runs one step. Returns DONE, or the code of what is wrong with the step; then nothing is computed.
int NAME(forward)(const Model *model, const Step *step) {
  NAME(StepTask) task = {.model = model, .step = step};
  int wrong = check_step(model, step);
  if (wrong) return wrong;
  pthread_mutex_lock(&memory.in_use);
  wrong = prepare_workspace(&task.space, model, step, sizeof(ACTIVATION));
  if (!wrong) team_run(NAME(run_layers), &task);
  pthread_mutex_unlock(&memory.in_use);
  return wrong;
}
