// Included once for each element type: one step of a llama-shaped decoder, all layers in one call.
//
// Every thread of the team runs `decode`; each phase hands out tickets and ends when all are done.

// Queries, keys and values to where attention reads them: head norms, rotation, and keys and values into
// the cache. A ticket is a few rows, or one head of them when there are few.
static void NAME(place)(Member *me, const NAME(Task) * task, const Layer *layer,
                        const NAME(Part) * parts) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  long dim = m->head_dim, all = m->heads + m->kv_heads;
  long groups = row_groups(step->rows), split = groups >= 4 * team.threads ? 1 : all;
  for (long ticket; (ticket = team_next(&me->draw, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = at_most(start + ROW_GROUP, step->rows);
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? all : from + 1;
    for (long head = from; head < to; head++) {
      int is_key = head >= m->heads;
      const NAME(Part) *part = parts + is_key;
      long column = (is_key ? head - m->heads : head) * dim;
      const float *norm = is_key ? layer->k_norm : layer->q_norm;
      for (long row = start; row < stop; row++) {
        long at = step->position[row];
        float *x = part->y + row * part->y_stride + column;
        if (norm) {
          long module = layer->modules[is_key ? K_NORM : Q_NORM];
          NAME(norm_head)(x, norm, site_of(space->sites, row, module), dim, m->epsilon);
        }
        NAME(rotate_head)(x, m->cosines + at * dim / 2, m->sines + at * dim / 2, dim);
        if (!is_key) {
          // By head of keys, so that the queries that read the same keys are neighbours.
          ELEMENT *query = (ELEMENT *)space->query + row * m->heads * dim + head * dim;
          NAME(narrow_row)(x, dim, query);
          continue;
        }
        long kv = head - m->heads, size = LANES * dim;
        long cell = kv * m->blocks + space->home[row];
        NAME(put_key)((ELEMENT *)layer->keys + cell * size, at % LANES, x, dim);
        NAME(put_value)((ELEMENT *)layer->values + cell * size, at % LANES,
                        parts[2].y + row * parts[2].y_stride + column, dim);
      }
    }
  }
}

// Attention. A ticket is one head of keys of up to QUERY_TOKENS neighbouring rows of a sequence.
static void NAME(mix)(Member *me, const NAME(Task) * task, const Layer *layer) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  long dim = m->head_dim, group = m->heads / m->kv_heads, width = m->heads * dim;
  const ELEMENT *query = space->query;
  ELEMENT *attended = space->attended;
  for (long ticket; (ticket = team_next(&me->draw, space->spans * m->kv_heads)) >= 0;) {
    const Query_span *span = space->span + ticket / m->kv_heads;
    long kv = ticket % m->kv_heads, rows = span->stop - span->start;
    ELEMENT *q = me->query;
    for (long r = 0; r < rows; r++)
      memcpy(q + r * group * dim, query + (span->start + r) * width + kv * group * dim,
             sizeof(ELEMENT) * (size_t)(group * dim));
    long plane = kv * m->blocks * LANES * dim;
    NAME(attend)(q, rows, group, dim, (const ELEMENT *)layer->keys + plane,
                 (const ELEMENT *)layer->values + plane, step->table + span->sequence * step->width,
                 step->position[span->start], layer->window, (float)m->scale, me->scores,
                 me->weights, space->score_stride, me->mixed);
    for (long r = 0; r < rows; r++)
      NAME(narrow_row)(me->mixed + r * group * dim, group * dim,
                       attended + (span->start + r) * width + kv * group * dim);
  }
}

// act = silu(gate) * up. A ticket is a few rows, or a part of their columns when there are few.
static void NAME(gate)(Member *me, const NAME(Task) * task, const NAME(Part) * parts) {
  const Work_space *space = &task->space;
  long middle = task->model->middle;
  long rows = task->step->rows, groups = row_groups(rows);
  long split = groups >= 4 * team.threads ? 1 : 4 * team.threads;
  long share = ((middle + split - 1) / split + 63) / 64 * 64;
  for (long ticket; (ticket = team_next(&me->draw, groups * split)) >= 0;) {
    long start = ticket / split * ROW_GROUP, stop = at_most(start + ROW_GROUP, rows);
    long from = split == 1 ? 0 : ticket % split * share;
    long to = split == 1 || from + share > middle ? middle : from + share;
    if (from >= to) continue;
    for (long row = start; row < stop; row++)
      NAME(gated)(parts[0].y + row * parts[0].y_stride + from,
                  parts[1].y + row * parts[1].y_stride + from, to - from,
                  (ELEMENT *)space->act + row * middle + from);
  }
}

// Logits of the wanted rows, and the likeliest token of each.
static void NAME(predict)(Member *me, const NAME(Task) * task) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  ELEMENT *normed = space->normed;
  for (long i; (i = team_next(&me->draw, step->wanted_rows)) >= 0;)
    NAME(norm_row)(space->residual + step->wanted[i] * m->hidden, m->final_norm,
                   site_of(space->head_sites, i, m->final_norm_module), m->hidden, m->epsilon,
                   normed + i * m->hidden);
  const NAME(Products) head = {{{&m->head, normed, m->hidden, step->logits, m->vocabulary,
                                 space->head_sites, m->head_module, space->low, space->rank_stride,
                                 space->needs.head_rows}},
                               1};
  NAME(project)(me, space, &head, step->head_run, step->head_runs);
  for (long i; (i = team_next(&me->draw, step->wanted_rows)) >= 0;)
    step->likeliest[i] = likeliest(step->logits + i * m->vocabulary, m->vocabulary);
}

static void NAME(decode)(void *context, int thread) {
  const NAME(Task) *task = context;
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  size_t used = 0;
  char *own = space->member + thread * space->member_size;
  Member member = member_of(space, m, sizeof(ELEMENT), thread, own, &used), *me = &member;
  const Run *runs = step->run;
  long count = step->runs;

  NAME(embed)(me, task);
  for (long i = 0; i < m->layers; i++) {
    const Layer *l = m->layer + i, *next = i + 1 < m->layers ? l + 1 : NULL;
    NAME(Products) heads = NAME(heads_of)(task, l);
    NAME(Products) out = NAME(product_of)(task, &l->o, l->modules[O], space->attended);
    NAME(Products) gates = NAME(gates_of)(task, l);
    NAME(Products) down = NAME(product_of)(task, &l->down, l->modules[DOWN], space->act);
    Coming coming[4];
    if (space->sites) {
      NAME(announce)(me, &heads, &out, step->rows, coming);
      NAME(announce)(me, &out, &gates, step->rows, coming + 1);
      NAME(announce)(me, &gates, &down, step->rows, coming + 2);
    }
    if (space->sites && next) {
      const NAME(Products) after = NAME(heads_of)(task, next);
      NAME(announce)(me, &down, &after, step->rows, coming + 3);
    }
    NAME(project)(me, space, &heads, runs, count);
    NAME(place)(me, task, l, heads.part);
    NAME(mix)(me, task, l);
    NAME(project)(me, space, &out, runs, count);
    if (space->needs.bottlenecks) NAME(bottlenecks)(me, task, out.part, l->modules[ATTENTION]);
    NAME(settle)(me, task, out.part, l->mlp_norm, l->modules[MLP_NORM]);
    NAME(project)(me, space, &gates, runs, count);
    NAME(gate)(me, task, gates.part);
    NAME(project)(me, space, &down, runs, count);
    if (space->needs.bottlenecks) NAME(bottlenecks)(me, task, down.part, l->modules[MLP]);
    NAME(settle)(me, task, down.part, next ? next->attention_norm : NULL,
                 next ? next->modules[ATTENTION_NORM] : 0);
  }
  if (step->wanted_rows) NAME(predict)(me, task);
}

// Runs one step. Returns DONE or what is wrong with it; nothing is computed then.
int NAME(forward)(const Model *model, const Step *step) {
  NAME(Task) task = {.model = model, .step = step};
  int wrong = check_step(model, step);
  if (wrong) return wrong;
  pthread_mutex_lock(&memory.in_use);
  wrong = lay_out(&task.space, model, step, sizeof(ELEMENT));
  if (!wrong) team_run(NAME(decode), &task);
  pthread_mutex_unlock(&memory.in_use);
  return wrong;
}
