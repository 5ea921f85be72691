// Included once for each element type: one step of a decoder, all layers in one call.
//
// Every thread of the team runs `run_layers`. Each phase is a round of tickets (team.h), which ends for all
// threads together.

// wide [rows, q | k | v]. Applies head norms and rotary embeddings to queries and keys, stores queries in
// `query` and keys and values in the cache. A ticket is ROW_GROUP rows; one head of them if tickets are few.
static void NAME(rope_and_store_kv)(ThreadContext *me, const NAME(StepTask) *task, const Layer *layer) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  long dim = m->head_dim, half = m->rotary_dim / 2, all = m->heads + m->kv_heads;
  long width = (all + m->kv_heads) * dim;
  long groups = row_group_count(step->rows), split = groups >= 4 * team.threads ? 1 : all;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = min_long(start + ROW_GROUP, step->rows);
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? all : from + 1;
    for (long head = from; head < to; head++) {
      int is_key = head >= m->heads;
      const Norm *norm = is_key ? &layer->k_norm : &layer->q_norm;
      for (long row = start; row < stop; row++) {
        long at = step->position[row];
        float *x = space->wide + row * width + head * dim;
        if (norm->weight) NAME(norm_in_place)(x, norm, site_of_norm(space->sites, row, norm), dim);
        if (half) NAME(rope_head)(x, layer->cosines + at * half, layer->sines + at * half, 2 * half);
        if (!is_key) {
          // By head of keys, so that the queries that read the same keys are neighbours.
          ACTIVATION *query = (ACTIVATION *)space->query + row * m->heads * dim + head * dim;
          NAME(round_row)(x, dim, query);
          continue;
        }
        long kv = head - m->heads, size = PANEL * dim;
        long cell = kv * m->blocks + space->kv_block[row];
        NAME(store_key)((ELEMENT *)layer->keys + cell * size, at % PANEL, x, dim);
        NAME(store_value)((ELEMENT *)layer->values + cell * size, at % PANEL, x + m->kv_heads * dim, dim);
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
                                .scale = (float)layer->scale,
                                .softcap = (float)layer->softcap,
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

// wide [rows, gate | up], or [rows, up] if MLPs are not gated. act = activation(gate) * up, or
// activation(up). A ticket is ROW_GROUP rows; a part of their columns if tickets are few.
static void NAME(activate)(ThreadContext *me, const NAME(StepTask) *task) {
  const Workspace *space = &task->space;
  const Model *m = task->model;
  long middle = m->middle, width = m->gated ? 2 * middle : middle;
  long rows = task->step->rows, groups = row_group_count(rows);
  long split = groups >= 4 * team.threads ? 1 : 4 * team.threads;
  long share = ((middle + split - 1) / split + 63) / 64 * 64;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = min_long(start + ROW_GROUP, rows);
    long from = split == 1 ? 0 : ticket % split * share;
    long to = split == 1 || from + share > middle ? middle : from + share;
    if (from >= to) continue;
    for (long row = start; row < stop; row++) {
      const float *gate = space->wide + row * width + from;
      NAME(gate_row)(gate, m->gated ? gate + middle : NULL, (int)m->activation, to - from,
                     (ACTIVATION *)space->act + row * middle + from);
    }
  }
}

// Computes the likeliest token of each wanted row, and the logits unless the tokens are found without them.
static void NAME(compute_logits)(ThreadContext *me, const NAME(StepTask) *task) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Workspace *space = &task->space;
  ACTIVATION *normed = space->normed;
  for (long i; (i = team_next_ticket(&me->cursor, step->wanted_rows)) >= 0;) {
    NAME(norm_row)(space->residual + step->wanted[i] * m->hidden, &m->final_norm,
                   site_of_norm(space->head_sites, i, &m->final_norm), m->hidden, normed + i * m->hidden);
    if (space->screening.rows) NAME(screen_row)(task, i);
  }
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
  if (space->screening.rows && NAME(find_likeliest)(me, task, &product)) return;
  const NAME(Products) head = {{product}, 1};
  NAME(run_products)(me, space, &head, step->head_run, step->head_runs);
  for (long i; (i = team_next_ticket(&me->cursor, step->wanted_rows)) >= 0;) {
    step->likeliest[i] = finite_argmax(step->logits + i * m->vocabulary, m->vocabulary);
    if (m->logit_softcap) cap_row(step->logits + i * m->vocabulary, m->vocabulary, (float)m->logit_softcap);
  }
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
    NAME(Products) qkv = NAME(products_of)(task, l->qkv, l->qkv_count, space->normed);
    NAME(Products) out = NAME(products_of)(task, &l->out, 1, space->attended);
    NAME(Products) gate_up = NAME(products_of)(task, l->gate_up, l->gate_up_count, space->normed);
    NAME(Products) down = NAME(products_of)(task, &l->down, 1, space->act);
    NextProduct next_product[4];
    if (space->sites) {
      NAME(set_next_product)(me, &qkv, &out, step->rows, next_product);
      NAME(set_next_product)(me, &out, &gate_up, step->rows, next_product + 1);
      NAME(set_next_product)(me, &gate_up, &down, step->rows, next_product + 2);
    }
    if (space->sites && next) {
      const NAME(Products) next_qkv = NAME(products_of)(task, next->qkv, next->qkv_count, space->normed);
      NAME(set_next_product)(me, &down, &next_qkv, step->rows, next_product + 3);
    }
    NAME(run_products)(me, space, &qkv, runs, count);
    NAME(rope_and_store_kv)(me, task, l);
    NAME(attention)(me, task, l);
    NAME(run_products)(me, space, &out, runs, count);
    if (space->needs.bottlenecks) NAME(add_bottlenecks)(me, task, out.product, l->attention_module);
    NAME(add_residual_and_norm)(me, task, out.product, &l->attention_out_norm, &l->mlp_norm);
    NAME(run_products)(me, space, &gate_up, runs, count);
    NAME(activate)(me, task);
    NAME(run_products)(me, space, &down, runs, count);
    if (space->needs.bottlenecks) NAME(add_bottlenecks)(me, task, down.product, l->mlp_module);
    NAME(add_residual_and_norm)(me, task, down.product, &l->mlp_out_norm,
                                next ? &next->attention_norm : NULL);
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
