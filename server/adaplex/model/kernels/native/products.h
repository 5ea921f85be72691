// Included once for each element type: the products of a step and the changes of adapters to them.

// One step, as every thread of the team sees it.
typedef struct {
  const Model *model;
  const Step *step;
  Workspace space;
} NAME(StepTask);

// The products of a phase, which read the same x: those of qkv, out, gate_up or down, or the output layer.
typedef struct {
  NAME(ProductTask) product[3];
  long count;
} NAME(Products);

// linear [count], x [rows, in]. A phase of the products of linears that read the same x: their y lie side by
// side in `wide`, and the h of each is a part of `shrunk`.
static NAME(Products) NAME(products_of)(const NAME(StepTask) *task, const Linear *linear, long count,
                                        const void *x) {
  const Workspace *space = &task->space;
  NAME(Products) made = {.count = count};
  long width = 0, column = 0;
  for (long i = 0; i < count; i++) width += linear[i].weight.out_features;
  for (long i = 0; i < count; column += linear[i++].weight.out_features)
    made.product[i] = (NAME(ProductTask)){
        .weight = &linear[i].weight,
        .x = x,
        .x_stride = linear[i].weight.in_features,
        .y = space->wide + column,
        .y_stride = width,
        .sites = space->sites,
        .module = linear[i].module,
        .h = (ACTIVATION *)space->shrunk + i * task->step->rows * space->rank_stride,
        .h_stride = space->rank_stride,
    };
  return made;
}

// Makes the tiles of `products` prefetch the `a` of the phase `next`; fills in `next_product`, which must
// live as long as `products`.
static void NAME(set_next_product)(const ThreadContext *me, NAME(Products) *products,
                                   const NAME(Products) *next, long rows, NextProduct *next_product) {
  int thread = me->cursor.thread;
  *next_product =
      (NextProduct){next->count, next->product[0].weight->in_features, .row = team_share_start(thread, rows),
                    .stop = team_share_start(thread + 1, rows)};
  for (long i = 0; i < next->count; i++) next_product->module[i] = next->product[i].module;
  // Only tiles of at least four rows prefetch; most have eight rows and two panels.
  for (long i = 0; i < products->count; i++)
    next_product->tiles += panel_count(products->product[i].weight) / 2 * ((rows + 4) / 8) / rows;
  for (long i = 0; next_product->tiles && i < products->count; i++)
    products->product[i].next_product = next_product;
}

// x [n], scale [n] or null, to [n]. to = x * scale; to = x without a scale.
static void NAME(scale_row)(const ACTIVATION *x, const ELEMENT *scale, long n, ACTIVATION *to) {
  if (!scale) {
    memcpy(to, x, sizeof(ACTIVATION) * (size_t)n);
    return;
  }
  for (long i = 0; i < n; i += VEC_LANES)
    ACT(store_partial)(to + i, ACT(load_partial)(x + i, n - i) * NAME(load_partial)(scale + i, n - i), n - i);
}

// runs [run_count]. The products of a phase, each of which reads a scaled copy of x if an adapter scales its
// input. A ticket is a row.
static NAME(Products) NAME(scale_inputs)(ThreadContext *me, const Workspace *space,
                                         const NAME(Products) *products, const Run *runs, long run_count) {
  NAME(Products) scaled = *products;
  long rows = runs[run_count - 1].stop;
  for (int i = 0; i < products->count; i++) {
    NAME(ProductTask) *product = scaled.product + i;
    if (!any_input_scale(runs, run_count, product->module)) continue;
    long in = product->weight->in_features;
    ACTIVATION *copy = (ACTIVATION *)space->scaled + i * rows * in;
    for (long row; (row = team_next_ticket(&me->cursor, rows)) >= 0;) {
      const Site *site = site_of(product->sites, row, product->module);
      NAME(scale_row)(product->x + row * in, site ? site->input_scale : NULL, in, copy + row * in);
    }
    product->x = copy;
  }
  return scaled;
}

// Quantizes the x of every product of a phase whose weight has int8_inputs; products of the same x share it.
// A ticket is a row.
static void NAME(quantize_inputs)(ThreadContext *me, const Workspace *space, NAME(Products) *products,
                                  long rows) {
  for (int i = 0; i < products->count; i++) {
    NAME(ProductTask) *product = products->product + i;
    if (!product->weight->int8_inputs) continue;
    for (int j = 0; j < i && !product->quantized.values; j++)
      if (products->product[j].x == product->x) product->quantized = products->product[j].quantized;
    if (product->quantized.values) continue;
    const long in = product->weight->in_features;
    product->quantized = quantized_from(space->quantized, i * rows, in);
    for (long row; (row = team_next_ticket(&me->cursor, rows)) >= 0;)
      NAME(quantize_row)(product->x + row * in, in, product->quantized, row);
  }
}

// runs [run_count]. h = a x for all rows of adapters that have a rank at a product of the phase. A ticket is
// up to SHRINK_ROWS rows of one adapter, for all products of the phase; for one of them if tickets are few.
static void NAME(shrink_all)(ThreadContext *me, const NAME(Products) *products, const Run *runs,
                             long run_count) {
  long module[3];
  for (long i = 0; i < products->count; i++) module[i] = products->product[i].module;
  long groups = rank_ranges(me->ranges, module, products->count, runs, run_count, SHRINK_ROWS);
  if (!groups) return;

  long split = groups >= 4 * team.threads ? 1 : products->count;
  const TicketRange *range = me->ranges;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, groups * split)) >= 0;) {
    range = range_of_ticket(me->ranges, range, ticket / split);
    long start = range->start + (ticket / split - range->first_ticket) * SHRINK_ROWS;
    long rows = min_long(range->stop - start, SHRINK_ROWS);
    long from = split == 1 ? 0 : ticket % split, to = split == 1 ? products->count : from + 1;
    for (const NAME(ProductTask) *product = products->product + from; product < products->product + to;
         product++) {
      const Site *site = site_of(product->sites, start, product->module);
      const NAME(ShrinkTask) shrink = {.x = product->x + start * product->x_stride,
                                       .x_stride = product->x_stride,
                                       .in_features = product->weight->in_features,
                                       .a = site->a,
                                       .rank = site->rank,
                                       .h = product->h + start * product->h_stride,
                                       .h_stride = product->h_stride};
      NAME(shrink)(&shrink, rows);
    }
  }
}

// ranges [count of products * (2 * run_count + 1) + 1], runs [run_count]. For each product, makes a range of
// each run that has its own weight and of each group of neighbouring other runs, with a ticket for each group
// of panels; returns the number of tickets.
static long NAME(weight_ranges)(TicketRange *ranges, const NAME(Products) *products, const Run *runs,
                                long run_count) {
  TicketRange *end = ranges;
  long tickets = 0;
  for (int i = 0; i < products->count; i++) {
    long groups = panel_group_count(products->product[i].weight), base = -1;
    for (long r = 0; r <= run_count; r++) {
      const Site *own = r < run_count ? runs[r].sites : NULL;
      if (own) own += products->product[i].module;
      if (own && !has_own_weight(own, products->product[i].weight)) own = NULL;
      if (base >= 0 && (r == run_count || own)) {
        *end++ = (TicketRange){i, runs[base].start, runs[r - 1].stop, NULL, tickets};
        tickets += groups;
        base = -1;
      }
      if (r == run_count) break;
      if (own) {
        *end++ = (TicketRange){i, runs[r].start, runs[r].stop, own, tickets};
        tickets += groups;
      } else if (base < 0) {
        base = r;
      }
    }
  }
  *end = (TicketRange){.first_ticket = tickets};
  return tickets;
}

// runs [run_count]. Computes all products of a phase with the changes of adapters. Runs that have their own
// weight are multiplied by it; neighbouring other runs share the tickets of the base's weight.
static void NAME(run_products)(ThreadContext *me, const Workspace *space, const NAME(Products) *products,
                               const Run *runs, long run_count) {
  NAME(Products) changed;
  if (space->needs.input_scales) {
    changed = NAME(scale_inputs)(me, space, products, runs, run_count);
    products = &changed;
  }
  if (space->quantized.values) {
    changed = *products;
    NAME(quantize_inputs)(me, space, &changed, runs[run_count - 1].stop);
    products = &changed;
  }
  if (products->product[0].sites) NAME(shrink_all)(me, products, runs, run_count);
  long tickets = NAME(weight_ranges)(me->ranges, products, runs, run_count);
  const TicketRange *range = me->ranges;
  for (long ticket; (ticket = team_next_ticket(&me->cursor, tickets)) >= 0;) {
    range = range_of_ticket(me->ranges, range, ticket);
    const NAME(ProductTask) *product = products->product + range->product;
    long first = (ticket - range->first_ticket) * PANEL_GROUP;
    long last = min_long(first + PANEL_GROUP, panel_count(product->weight));
    NAME(multiply_panels)(product, range->own, range->start, range->stop, first, last);
  }
}
