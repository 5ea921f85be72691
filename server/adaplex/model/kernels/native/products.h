// Included once for each element type: the products of a step, with what adapters do to them.

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

// A product of rows [.., in] of `x` into columns from `column` on of rows of `width`; `slot` of `low`.
static NAME(Part) NAME(part_of)(const NAME(Task) * task, const Weight *weight, long module, const void *x,
                                long column, long width, long slot) {
  const Work_space *space = &task->space;
  return (NAME(Part)){weight, x, weight->in, space->wide + column, width, space->sites, module,
                      (ELEMENT *)space->low + slot * task->step->rows * space->rank_stride,
                      space->rank_stride, 0};
}

static NAME(Products) NAME(heads_of)(const NAME(Task) * task, const Layer *l) {
  const void *x = task->space.normed;
  long q = l->q.out, kv = l->k.out, width = q + 2 * kv;
  return (NAME(Products)){{NAME(part_of)(task, &l->q, l->modules[Q], x, 0, width, 0),
                           NAME(part_of)(task, &l->k, l->modules[K], x, q, width, 1),
                           NAME(part_of)(task, &l->v, l->modules[V], x, q + kv, width, 2)},
                          3};
}

static NAME(Products) NAME(gates_of)(const NAME(Task) * task, const Layer *l) {
  const void *x = task->space.normed;
  long middle = l->gate.out;
  return (NAME(Products)){{NAME(part_of)(task, &l->gate, l->modules[GATE], x, 0, 2 * middle, 0),
                           NAME(part_of)(task, &l->up, l->modules[UP], x, middle, 2 * middle, 1)},
                          2};
}

static NAME(Products) NAME(product_of)(const NAME(Task) * task, const Weight *weight, long module,
                                       const void *x) {
  return (NAME(Products)){{NAME(part_of)(task, weight, module, x, 0, weight->out, 0)}, 1};
}

// Tells the products of a phase which come after them; fills `coming`.
static void NAME(announce)(const Member *me, NAME(Products) * now, const NAME(Products) * next, long rows,
                           Coming *coming) {
  int thread = me->draw.thread;
  *coming = (Coming){next->parts, next->part[0].weight->in, .row = team_share(thread, rows),
                     .stop = team_share(thread + 1, rows)};
  for (long i = 0; i < next->parts; i++) coming->module[i] = next->part[i].module;
  // Of eight rows, or four, and two panels each.
  for (long i = 0; i < now->parts; i++)
    coming->tiles += panels_of(now->part[i].weight) / 2 * ((rows + 4) / 8) / rows;
  for (long i = 0; coming->tiles && i < now->parts; i++) now->part[i].coming = coming;
}

// to[i] = x[i] * scale[i], or x[i] without a scale.
static void NAME(scale_row)(const ELEMENT *x, const ELEMENT *scale, long n, ELEMENT *to) {
  if (!scale) {
    memcpy(to, x, sizeof(ELEMENT) * (size_t)n);
    return;
  }
  for (long i = 0; i < n; i += LANES)
    NAME(store_part)(to + i, NAME(load_part)(x + i, n - i) * NAME(load_part)(scale + i, n - i), n - i);
}

// The products with a scaled copy of what they read, where an adapter scales it.
static NAME(Products) NAME(scale_inputs)(Member *me, const Work_space *space,
                                         const NAME(Products) * now, const Run *runs,
                                         long run_count) {
  NAME(Products) scaled = *now;
  long rows = runs[run_count - 1].stop;
  for (int i = 0; i < now->parts; i++) {
    NAME(Part) *part = scaled.part + i;
    if (!scales_input(runs, run_count, part->module)) continue;
    long in = part->weight->in;
    ELEMENT *copy = (ELEMENT *)space->scaled + i * rows * in;
    for (long row; (row = team_next(&me->draw, rows)) >= 0;) {
      const Site *site = site_of(part->sites, row, part->module);
      NAME(scale_row)(part->x + row * in, site ? site->input_scale : NULL, in, copy + row * in);
    }
    part->x = copy;
  }
  return scaled;
}

// h = a x for all rows of adapters that touch a product. A ticket is a few rows of one, by all that it has
// for the phase; or by what it has for one part, when there are few.
static void NAME(shrink_all)(Member *me, const NAME(Products) * now, const Run *runs, long run_count) {
  long module[3];
  for (long i = 0; i < now->parts; i++) module[i] = now->part[i].module;
  long groups = rank_passes(me->passes, module, now->parts, runs, run_count, SHRINK_ROWS);
  if (!groups) return;

  long split = groups >= 4 * team.threads ? 1 : now->parts;
  const Pass *pass = me->passes;
  for (long ticket; (ticket = team_next(&me->draw, groups * split)) >= 0;) {
    pass = pass_of(me->passes, pass, ticket / split);
    long start = pass->start + (ticket / split - pass->first_ticket) * SHRINK_ROWS;
    long rows = at_most(pass->stop - start, SHRINK_ROWS);
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? now->parts : from + 1;
    for (const NAME(Part) *part = now->part + from; part < now->part + to; part++) {
      const Site *site = site_of(part->sites, start, part->module);
      NAME(shrink)(part->x + start * part->x_stride, part->x_stride, part->weight->in, site->a,
                   site->rank, rows, part->h + start * part->h_stride, part->h_stride);
    }
  }
}

// All products of a phase, whole. A run of rows that has a weight of its own is multiplied by that; the
// others share passes over the base.
static void NAME(project)(Member *me, const Work_space *space, const NAME(Products) * now, const Run *runs,
                          long run_count) {
  NAME(Products) scaled;
  if (space->needs.input_scales) {
    scaled = NAME(scale_inputs)(me, space, now, runs, run_count);
    now = &scaled;
  }
  if (now->part[0].sites) NAME(shrink_all)(me, now, runs, run_count);
  Pass *end = me->passes;
  long tickets = 0;
  for (int i = 0; i < now->parts; i++) {
    long groups = panel_groups(now->part[i].weight), base = -1;
    for (long r = 0; r <= run_count; r++) {
      const Site *own = r < run_count ? runs[r].sites : NULL;
      if (own) own += now->part[i].module;
      if (own && !has_own(own, now->part[i].weight)) own = NULL;
      if (base >= 0 && (r == run_count || own)) {
        *end++ = (Pass){i, runs[base].start, runs[r - 1].stop, NULL, tickets};
        tickets += groups;
        base = -1;
      }
      if (r == run_count) break;
      if (own) {
        *end++ = (Pass){i, runs[r].start, runs[r].stop, own, tickets};
        tickets += groups;
      } else if (base < 0) {
        base = r;
      }
    }
  }
  *end = (Pass){.first_ticket = tickets};

  const Pass *pass = me->passes;
  for (long ticket; (ticket = team_next(&me->draw, tickets)) >= 0;) {
    pass = pass_of(me->passes, pass, ticket);
    const NAME(Part) *part = now->part + pass->part;
    long first = (ticket - pass->first_ticket) * PANEL_GROUP;
    long last = at_most(first + PANEL_GROUP, panels_of(part->weight));
    NAME(panels)(part, pass->own, pass->start, pass->stop, first, last);
  }
}
