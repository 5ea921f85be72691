// Included once for each element type: one step of a llama-shaped decoder, all layers in one call.
//
// Every thread of the team runs `decode`; each phase hands out tickets and ends when all are done.

typedef struct {
  const Model *model;
  const Step *step;
  Work_space space;
} NAME(Task);

// The products of a phase.
typedef struct {
  NAME(Part) part[3];
  long parts;
} NAME(Products);

// h = a x for all rows of adapters that touch a product.
static void NAME(shrink_all)(Member *me, const NAME(Products) * now, const Run *runs, long run_count) {
  Pass *pass = me->passes;
  long tickets = 0;
  for (long r = 0; r < run_count; r++)
    for (int i = 0; i < now->parts && runs[r].sites; i++) {
      if (!runs[r].sites[now->part[i].module].rank) continue;
      *pass++ = (Pass){i, runs[r].start, runs[r].stop, NULL, tickets};
      tickets += (runs[r].stop - runs[r].start + SHRINK_ROWS - 1) / SHRINK_ROWS;
    }
  if (!tickets) return;
  *pass = (Pass){.first_ticket = tickets};

  pass = me->passes;
  for (long ticket; (ticket = team_next(&me->base, tickets)) >= 0;) {
    while (ticket >= pass[1].first_ticket) pass++;
    const NAME(Part) *part = now->part + pass->part;
    long start = pass->start + (ticket - pass->first_ticket) * SHRINK_ROWS;
    long rows = at_most(pass->stop - start, SHRINK_ROWS);
    const Site *site = NAME(site)(part, start);
    NAME(shrink)(part->x + start * part->x_stride, part->x_stride, part->weight->in, site->a,
                 site->rank, rows, part->h + start * part->h_stride, part->h_stride);
  }
}

// All products of a phase, whole. A run of rows that has a weight of its own is multiplied by that; the
// others share passes over the base.
static void NAME(project)(Member *me, const NAME(Products) * now, const Run *runs, long run_count) {
  if (now->part[0].sites) NAME(shrink_all)(me, now, runs, run_count);
  Pass *pass = me->passes;
  long tickets = 0;
  for (int i = 0; i < now->parts; i++) {
    long groups = panel_groups(now->part[i].weight), base = -1;
    for (long r = 0; r <= run_count; r++) {
      const Site *own = r < run_count ? runs[r].sites : NULL;
      if (own) own += now->part[i].module;
      if (own && !has_own(own, now->part[i].weight)) own = NULL;
      if (base >= 0 && (r == run_count || own)) {
        *pass++ = (Pass){i, runs[base].start, runs[r - 1].stop, NULL, tickets};
        tickets += groups;
        base = -1;
      }
      if (r == run_count) break;
      if (own) {
        *pass++ = (Pass){i, runs[r].start, runs[r].stop, own, tickets};
        tickets += groups;
      } else if (base < 0) {
        base = r;
      }
    }
  }
  *pass = (Pass){.first_ticket = tickets};

  pass = me->passes;
  for (long ticket; (ticket = team_next(&me->base, tickets)) >= 0;) {
    while (ticket >= pass[1].first_ticket) pass++;
    const NAME(Part) *part = now->part + pass->part;
    long first = (ticket - pass->first_ticket) * PANEL_GROUP;
    long panels = (part->weight->out + LANES - 1) / LANES;
    long last = at_most(first + PANEL_GROUP, panels);
    NAME(panels)(part, pass->own, pass->start, pass->stop, first, last);
  }
}

// Queries, keys and values to where attention reads them: head norms, rotation, and keys and values into
// the cache. A ticket is a few rows, or one head of them when there are few.
static void NAME(place)(Member *me, const NAME(Task) * task, const Layer *layer,
                        const NAME(Part) * parts) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  long dim = m->head_dim, all = m->heads + m->kv_heads;
  long groups = row_groups(step->rows), split = groups >= 4 * team.threads ? 1 : all;
  for (long ticket; (ticket = team_next(&me->base, groups * split)) >= 0;) {
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
        if (norm) NAME(norm_head)(x, norm, dim, m->epsilon);
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
  for (long ticket; (ticket = team_next(&me->base, space->spans * m->kv_heads)) >= 0;) {
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

// Adds a product to the residual stream, and norms the sum for what comes next.
static void NAME(settle)(Member *me, const NAME(Task) * task, const NAME(Part) * part,
                         const float *norm) {
  const Work_space *space = &task->space;
  long hidden = task->model->hidden;
  for (long row; (row = team_next(&me->base, task->step->rows)) >= 0;) {
    float *residual = space->residual + row * hidden;
    const float *y = part->y + row * part->y_stride;
    for (long i = 0; i < hidden; i++) residual[i] += y[i];
    if (norm)
      NAME(norm_row)(residual, norm, hidden, task->model->epsilon,
                     (ELEMENT *)space->normed + row * hidden);
  }
}

// act = silu(gate) * up. A ticket is a few rows, or a part of their columns when there are few.
static void NAME(gate)(Member *me, const NAME(Task) * task, const NAME(Part) * parts) {
  const Work_space *space = &task->space;
  long middle = task->model->middle;
  long rows = task->step->rows, groups = row_groups(rows);
  long split = groups >= 4 * team.threads ? 1 : 4 * team.threads;
  long share = ((middle + split - 1) / split + 63) / 64 * 64;
  for (long ticket; (ticket = team_next(&me->base, groups * split)) >= 0;) {
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

static void NAME(embed)(Member *me, const NAME(Task) * task) {
  const Model *m = task->model;
  const Work_space *space = &task->space;
  for (long row; (row = team_next(&me->base, task->step->rows)) >= 0;) {
    float *residual = space->residual + row * m->hidden;
    const ELEMENT *from = (const ELEMENT *)m->embedding + task->step->tokens[row] * m->hidden;
    NAME(widen_row)(from, m->hidden, residual);
    NAME(norm_row)(residual, m->layer[0].attention_norm, m->hidden, m->epsilon,
                   (ELEMENT *)space->normed + row * m->hidden);
  }
}

// Logits of the wanted rows, and the likeliest token of each.
static void NAME(predict)(Member *me, const NAME(Task) * task) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  ELEMENT *normed = space->normed;
  for (long i; (i = team_next(&me->base, step->wanted_rows)) >= 0;)
    NAME(norm_row)(space->residual + step->wanted[i] * m->hidden, m->final_norm, m->hidden,
                   m->epsilon, normed + i * m->hidden);
  const NAME(Products) head = {{{&m->head, normed, m->hidden, step->logits, m->vocabulary,
                                 space->head_sites, m->head_module, space->low, space->rank_stride}},
                               1};
  NAME(project)(me, &head, step->head_run, step->head_runs);
  for (long i; (i = team_next(&me->base, step->wanted_rows)) >= 0;)
    step->likeliest[i] = likeliest(step->logits + i * m->vocabulary, m->vocabulary);
}

// A product of rows [.., in] of `x` into columns from `column` on of rows of `width`; `slot` of `low`.
static NAME(Part) NAME(part_of)(const NAME(Task) * task, const Weight *weight, long module, const void *x,
                                long column, long width, long slot) {
  const Work_space *space = &task->space;
  return (NAME(Part)){weight, x, weight->in, space->wide + column, width, space->sites, module,
                      (ELEMENT *)space->low + slot * task->step->rows * space->rank_stride, space->rank_stride};
}

static NAME(Products) NAME(heads_of)(const NAME(Task) * task, const Layer *l) {
  const void *x = task->space.normed;
  long q = l->q.out, kv = l->k.out, width = q + 2 * kv;
  return (NAME(Products)){{NAME(part_of)(task, &l->q, l->modules[0], x, 0, width, 0),
                           NAME(part_of)(task, &l->k, l->modules[1], x, q, width, 1),
                           NAME(part_of)(task, &l->v, l->modules[2], x, q + kv, width, 2)},
                          3};
}

static NAME(Products) NAME(gates_of)(const NAME(Task) * task, const Layer *l) {
  const void *x = task->space.normed;
  long middle = l->gate.out;
  return (NAME(Products)){{NAME(part_of)(task, &l->gate, l->modules[4], x, 0, 2 * middle, 0),
                           NAME(part_of)(task, &l->up, l->modules[5], x, middle, 2 * middle, 1)},
                          2};
}

static NAME(Products) NAME(product_of)(const NAME(Task) * task, const Weight *weight, long module,
                                       const void *x) {
  return (NAME(Products)){{NAME(part_of)(task, weight, module, x, 0, weight->out, 0)}, 1};
}

static void NAME(decode)(void *context, int thread) {
  const NAME(Task) *task = context;
  const Model *m = task->model;
  const Step *step = task->step;
  size_t used = 0;
  char *own = task->space.member + thread * task->space.member_size;
  Member member = member_of(&task->space, m, sizeof(ELEMENT), own, &used), *me = &member;
  const Run *runs = step->run;
  long count = step->runs;

  NAME(embed)(me, task);
  for (long i = 0; i < m->layers; i++) {
    const Layer *l = m->layer + i;
    const NAME(Products) heads = NAME(heads_of)(task, l);
    const NAME(Products) out = NAME(product_of)(task, &l->o, l->modules[3], task->space.attended);
    const NAME(Products) gates = NAME(gates_of)(task, l);
    const NAME(Products) down = NAME(product_of)(task, &l->down, l->modules[6], task->space.act);
    NAME(project)(me, &heads, runs, count);
    NAME(place)(me, task, l, heads.part);
    NAME(mix)(me, task, l);
    NAME(project)(me, &out, runs, count);
    NAME(settle)(me, task, out.part, l->mlp_norm);
    NAME(project)(me, &gates, runs, count);
    NAME(gate)(me, task, gates.part);
    NAME(project)(me, &down, runs, count);
    NAME(settle)(me, task, down.part, i + 1 < m->layers ? l[1].attention_norm : NULL);
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
