// Included once for each element type: one step of a llama-shaped decoder, all layers in one call.
//
// Every thread of the team runs `decode`; each phase hands out tickets and ends when all are done.

typedef struct {
  const Model *model;
  const Step *step;
  Work_space space;
} NAME(Task);

// One product of a phase: y = x W', and h = a x for the rows of adapters that touch the module.
typedef struct {
  const Weight *weight;
  long module;
  const ELEMENT *x;
  long x_stride;
  float *y;
  long y_stride;
  float *h;
} NAME(Part);

// y += bias and low-rank delta and the adapter's bias, for the columns [from, to) of a block of rows.
static void NAME(finish)(const NAME(Part) * part, const Block *block, long rank_stride, long from,
                         long to) {
  const Weight *w = part->weight;
  const Site *site = block->sites ? block->sites + part->module : NULL;
  long rows = block->stop - block->start;
  float *y = part->y + block->start * part->y_stride;
  if (w->bias)
    for (long r = 0; r < rows; r++)
      for (long n = from; n < to; n++) y[r * part->y_stride + n] += w->bias[n];
  if (site && site->rank)
    NAME(expand)(part->h + block->start * rank_stride, rank_stride, site->rank, site->b, w->out, from,
                 to, rows, y, part->y_stride);
  if (site && site->bias)
    for (long r = 0; r < rows; r++)
      for (long n = from; n < to; n++)
        y[r * part->y_stride + n] += NAME(widen)(((const ELEMENT *)site->bias)[n]);
}

// All products of a phase. A run of rows that has a dense weight of its own is multiplied by that; the
// others share passes over the base.
static void NAME(project)(Member *me, const NAME(Part) * parts, int count, const Run *runs,
                          long run_count, long rank_stride) {
  Pass *pass = me->passes;
  long tickets = 0;
  for (int i = 0; i < count; i++) {
    long groups = panel_groups(parts[i].weight), base = -1;
    for (long r = 0; r <= run_count; r++) {
      const Site *site = r < run_count && runs[r].sites ? runs[r].sites + parts[i].module : NULL;
      const void *dense = site ? site->dense : NULL;
      if (base >= 0 && (r == run_count || dense)) {
        *pass++ = (Pass){i, runs[base].start, runs[r - 1].stop, NULL, NULL, tickets};
        tickets += groups;
        base = -1;
      }
      if (r == run_count) break;
      if (dense) {
        *pass++ = (Pass){i, runs[r].start, runs[r].stop, dense, NULL, tickets};
        tickets += groups;
      } else if (base < 0) {
        base = r;
      }
    }
  }
  for (long r = 0; r < run_count; r++)
    for (int i = 0; i < count && runs[r].sites; i++) {
      const Site *site = runs[r].sites + parts[i].module;
      if (!site->rank) continue;
      *pass++ = (Pass){i, runs[r].start, runs[r].stop, NULL, site, tickets};
      tickets += (runs[r].stop - runs[r].start + SHRINK_ROWS - 1) / SHRINK_ROWS;
    }
  *pass = (Pass){.first_ticket = tickets};

  pass = me->passes;
  for (long ticket; (ticket = team_next(&me->base, tickets)) >= 0;) {
    while (ticket >= pass[1].first_ticket) pass++;
    const NAME(Part) *part = parts + pass->part;
    const Weight *w = part->weight;
    long index = ticket - pass->first_ticket;
    if (pass->site) {
      long start = pass->start + index * SHRINK_ROWS;
      long rows = pass->stop - start < SHRINK_ROWS ? pass->stop - start : SHRINK_ROWS;
      NAME(shrink)(part->x + start * part->x_stride, part->x_stride, w->in, pass->site->a,
                   pass->site->rank, rows, part->h + start * rank_stride, rank_stride);
      continue;
    }
    long panels = (w->out + LANES - 1) / LANES, first = index * PANEL_GROUP;
    long last = first + PANEL_GROUP < panels ? first + PANEL_GROUP : panels;
    NAME(panels)(w, pass->dense, part->x + pass->start * part->x_stride, part->x_stride,
                 pass->stop - pass->start, first, last, part->y + pass->start * part->y_stride,
                 part->y_stride);
  }
}

// Ends the products of queries, keys and values: deltas and biases, head norms, rotation, and keys and
// values into the cache. A ticket is a block of rows, or one head of it when there are few.
static void NAME(place)(Member *me, const NAME(Task) * task, const Layer *layer,
                        const NAME(Part) * parts) {
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  long dim = m->head_dim, all = m->heads + m->kv_heads;
  long split = space->blocks >= 4 * team.threads ? 1 : all;
  for (long ticket; (ticket = team_next(&me->base, space->blocks * split)) >= 0;) {
    const Block *block = space->block + ticket / split;
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? all : from + 1;
    for (long head = from; head < to; head++) {
      int is_key = head >= m->heads;
      const NAME(Part) *part = parts + is_key;
      long column = (is_key ? head - m->heads : head) * dim;
      NAME(finish)(part, block, space->rank_stride, column, column + dim);
      if (is_key) NAME(finish)(parts + 2, block, space->rank_stride, column, column + dim);
      const float *norm = is_key ? layer->k_norm : layer->q_norm;
      for (long row = block->start; row < block->stop; row++) {
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

// Ends a product that goes into the residual stream, and norms the sum for what comes next.
static void NAME(settle)(Member *me, const NAME(Task) * task, const NAME(Part) * part,
                         const float *norm) {
  const Work_space *space = &task->space;
  long hidden = task->model->hidden;
  for (long ticket; (ticket = team_next(&me->base, space->blocks)) >= 0;) {
    const Block *block = space->block + ticket;
    NAME(finish)(part, block, space->rank_stride, 0, hidden);
    for (long row = block->start; row < block->stop; row++) {
      float *residual = space->residual + row * hidden;
      const float *y = part->y + row * part->y_stride;
      for (long i = 0; i < hidden; i++) residual[i] += y[i];
      if (norm)
        NAME(norm_row)(residual, norm, hidden, task->model->epsilon,
                       (ELEMENT *)space->normed + row * hidden);
    }
  }
}

// Ends the products of gate and up: act = silu(gate) * up. A ticket is a block of rows, or a part of
// its columns when there are few.
static void NAME(gate)(Member *me, const NAME(Task) * task, const NAME(Part) * parts) {
  const Work_space *space = &task->space;
  long middle = task->model->middle;
  long split = space->blocks >= 4 * team.threads ? 1 : 4 * team.threads;
  long share = ((middle + split - 1) / split + 63) / 64 * 64;
  for (long ticket; (ticket = team_next(&me->base, space->blocks * split)) >= 0;) {
    const Block *block = space->block + ticket / split;
    long from = split == 1 ? 0 : ticket % split * share;
    long to = split == 1 || from + share > middle ? middle : from + share;
    if (from >= to) continue;
    NAME(finish)(parts, block, space->rank_stride, from, to);
    NAME(finish)(parts + 1, block, space->rank_stride, from, to);
    for (long row = block->start; row < block->stop; row++)
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
  NAME(Part) part = {&m->head, m->head_module, normed, m->hidden,
                     step->logits, m->vocabulary, space->low};
  NAME(project)(me, &part, 1, step->head_run, step->head_runs, space->rank_stride);
  for (long ticket; (ticket = team_next(&me->base, space->head_blocks)) >= 0;) {
    const Block *block = space->head_block + ticket;
    NAME(finish)(&part, block, space->rank_stride, 0, m->vocabulary);
    for (long i = block->start; i < block->stop; i++)
      step->likeliest[i] = likeliest(step->logits + i * m->vocabulary, m->vocabulary);
  }
}

static void NAME(decode)(void *context, int thread) {
  const NAME(Task) *task = context;
  const Model *m = task->model;
  const Step *step = task->step;
  const Work_space *space = &task->space;
  Member member = member_of(space, m, sizeof(ELEMENT), thread), *me = &member;
  ELEMENT *normed = space->normed, *attended = space->attended, *act = space->act;
  float *wide = space->wide, *low = space->low;
  long h = m->hidden, mid = m->middle, q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim;
  long qkv = q + 2 * kv, low_size = step->rows * space->rank_stride;

  NAME(embed)(me, task);
  for (long i = 0; i < m->layers; i++) {
    const Layer *l = m->layer + i;
    const int64_t *site = l->modules;
    const NAME(Part) heads[] = {{&l->q, site[0], normed, h, wide, qkv, low},
                                {&l->k, site[1], normed, h, wide + q, qkv, low + low_size},
                                {&l->v, site[2], normed, h, wide + q + kv, qkv, low + 2 * low_size}};
    NAME(project)(me, heads, 3, step->run, step->runs, space->rank_stride);
    NAME(place)(me, task, l, heads);
    NAME(mix)(me, task, l);
    const NAME(Part) out = {&l->o, site[3], attended, q, wide, h, low};
    NAME(project)(me, &out, 1, step->run, step->runs, space->rank_stride);
    NAME(settle)(me, task, &out, l->mlp_norm);
    const NAME(Part) gates[] = {{&l->gate, site[4], normed, h, wide, 2 * mid, low},
                                {&l->up, site[5], normed, h, wide + mid, 2 * mid, low + low_size}};
    NAME(project)(me, gates, 2, step->run, step->runs, space->rank_stride);
    NAME(gate)(me, task, gates);
    const NAME(Part) down = {&l->down, site[6], act, mid, wide, h, low};
    NAME(project)(me, &down, 1, step->run, step->runs, space->rank_stride);
    NAME(settle)(me, task, &down, i + 1 < m->layers ? l[1].attention_norm : NULL);
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
