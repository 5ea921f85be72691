// Small random models of odd shapes in buffers of exactly their size, for a build with sanitizers.
// Ends with 0 if no step fails, is not finite, or has other bits on two threads than on one.

#define _GNU_SOURCE
#include <stdio.h>

#include "kernels.c"

enum { ADAPTERS = 5, EACH = 13, LEAD = 2, SEQUENCES = 4, BLOCKS = 17, WIDTH = 4, POSITIONS = 64, STEPS = 5 };

typedef struct {
  size_t element;  // 4 or 2 bytes
  long layers, hidden, heads, kv_heads, head_dim, middle, vocabulary, window;
  int group, head_norms, biased;  // group: 0 for dense weights, 1 for nf4, else of int4
} Shape;

static const Shape SHAPES[] = {
    {4, 1, 37, 2, 1, 16, 23, 41, 0, 0, 0, 1},    {4, 2, 48, 6, 2, 32, 259, 70, 5, 0, 1, 0},
    {2, 2, 38, 3, 1, 16, 258, 51, 19, 0, 1, 1},  {2, 1, 64, 4, 2, 16, 1090, 333, 0, 0, 0, 0},
    {2, 2, 64, 4, 4, 16, 128, 130, 16, 1, 0, 1}, {2, 1, 128, 8, 2, 64, 192, 35, 0, 1, 1, 0},
    {2, 2, 96, 6, 3, 16, 160, 51, 0, 32, 0, 1},  {2, 1, 48, 3, 1, 16, 80, 70, 0, 16, 0, 0},
    {4, 2, 64, 4, 2, 16, 136, 41, 0, 64, 0, 1},
};

// Tokens of each sequence in each step.
static const int COUNTS[STEPS][SEQUENCES] = {
    {1, 0, 0, 0}, {3, 7, 1, 9}, {1, 1, 1, 1}, {0, 20, 0, 0}, {5, 1, 11, 2}};

static void *kept[4096];
static long keeps;
static uint64_t state = 88172645463325252u;

static long draw(long below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (long)(state >> 33) % below;
}

static void *keep(size_t bytes) {
  if (keeps == sizeof kept / sizeof *kept) abort();
  return kept[keeps++] = malloc(bytes);
}

static void release(void) {
  while (keeps) free(kept[--keeps]);
}

static void *elements(size_t size, long count) {
  char *made = keep(size * (size_t)count);
  for (long i = 0; i < count; i++) {
    float value = (float)(draw(2001) - 1000) / 4000;
    uint16_t narrow = bf16_narrow(value);
    memcpy(made + size * (size_t)i, size == 4 ? (void *)&value : (void *)&narrow, size);
  }
  return made;
}

static void *dense_panels(const Shape *s, long in, long out) {
  long per_unit = s->element == 4 ? 1 : 2;
  char *panels = keep((size_t)((out + LANES - 1) / LANES * (in / per_unit) * 64));
  pack_dense(elements(s->element, out * in), out, in, per_unit, panels);
  return panels;
}

static float *groups(size_t size, long count, long out) {
  float *packed = keep(sizeof(float) * (size_t)((out + LANES - 1) / LANES * count * LANES));
  pack_groups(elements(size, out * count * (4 / (long)size)), out, count, (uint32_t *)packed);
  return packed;
}

static Weight weight(const Shape *s, long in, long out, int group) {
  Weight w = {.in = in, .out = out, .bias = s->biased ? elements(4, out) : NULL};
  long each = group == 1 ? 64 : group;
  if (!group || in % each) {
    w.panels = dense_panels(s, in, out);
    return w;
  }
  long panels = (out + LANES - 1) / LANES;
  uint8_t *codes = keep((size_t)(out * in / 2));
  for (long i = 0; i < out * in / 2; i++) codes[i] = (uint8_t)draw(256);
  void *packed = keep((size_t)(panels * in / 8 * 64));
  pack_codes(codes, out, in, packed);
  w.panels = packed;
  w.scales = groups(group == 1 ? 4 : 2, in / each, out);
  if (group > 1) w.group = group;
  return w;
}

static Model model_of(const Shape *s) {
  long q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim, h = s->hidden, mid = s->middle;
  Layer *layers = keep(sizeof(Layer) * (size_t)s->layers);
  for (long i = 0; i < s->layers; i++) {
    size_t cache = s->element * (size_t)(kv * BLOCKS * LANES);
    layers[i] = (Layer){
        .q = weight(s, h, q, s->group),
        .k = weight(s, h, kv, s->group),
        .v = weight(s, h, kv, s->group),
        .o = weight(s, q, h, s->group),
        .gate = weight(s, h, mid, s->group),
        .up = weight(s, h, mid, s->group),
        .down = weight(s, mid, h, s->group),
        .attention_norm = elements(4, h),
        .mlp_norm = elements(4, h),
        .q_norm = s->head_norms ? elements(4, s->head_dim) : NULL,
        .k_norm = s->head_norms ? elements(4, s->head_dim) : NULL,
        .keys = memset(keep(cache), 0, cache),
        .values = memset(keep(cache), 0, cache),
        .window = s->window,
    };
    for (int part = 0; part < EACH; part++) layers[i].modules[part] = 3 + EACH * i + part;
  }
  long half = s->head_dim / 2;
  return (Model){
      .embedding = elements(s->element, s->vocabulary * h),
      .final_norm = elements(4, h),
      .cosines = elements(4, POSITIONS * half),
      .sines = elements(4, POSITIONS * half),
      .layer = layers,
      .head = weight(s, h, s->vocabulary, 0),
      .layers = s->layers,
      .hidden = h,
      .heads = s->heads,
      .kv_heads = s->kv_heads,
      .head_dim = s->head_dim,
      .middle = mid,
      .vocabulary = s->vocabulary,
      .positions = POSITIONS,
      .blocks = BLOCKS,
      .modules = 3 + EACH * s->layers,
      .embedding_module = 0,
      .final_norm_module = 1,
      .head_module = 2,
      .epsilon = 1e-5,
      .scale = 0.25,
  };
}

static void *maybe(const Shape *s, long count) { return draw(3) ? NULL : elements(s->element, count); }

static long low_rank(const Shape *s, Site *site, long in, long out) {
  static const long ranks[] = {0, 1, 3, 5, 8};
  long rank = ranks[draw(5)];
  if (!rank) return 0;
  site->a = elements(s->element, rank * in);
  site->b = elements(s->element, rank * out);
  return site->rank = rank;
}

// Some rows of a table, the first and the last among them.
static void replace_some(const Shape *s, Site *site, long rows, long features) {
  int32_t ids[] = {0, (int32_t)(rows / 3), (int32_t)(rows - 1)};
  site->row_count = 3;
  site->row_ids = memcpy(keep(sizeof ids), ids, sizeof ids);
  site->rows = elements(s->element, 3 * features);
}

static void at_linear(const Shape *s, Site *site, const Weight *w, int merged) {
  if (merged && w->group && draw(2)) site->zeros = groups(4, w->in / w->group, w->out);
  else if (merged && draw(2)) site->dense = dense_panels(s, w->in, w->out);
  if (!merged) low_rank(s, site, w->in, w->out);
  site->output_scale = maybe(s, w->out);
  site->input_scale = maybe(s, w->in);
  site->bias = maybe(s, w->out);
}

static void at_norm(const Shape *s, Site *site, long features) {
  site->dense = maybe(s, features);
  site->bias = maybe(s, features);
}

static void at_block(const Shape *s, Site *site, long hidden) {
  long width = low_rank(s, site, hidden, hidden);
  if (!width) return;
  site->inner = maybe(s, width);
  site->bias = maybe(s, hidden);
  site->shape = draw(8) + 16 * draw(4);
}

static void at_embedding(const Shape *s, Site *site, long vocabulary, long hidden) {
  low_rank(s, site, vocabulary, hidden);
  site->dense = maybe(s, vocabulary * hidden);
  if (draw(2)) replace_some(s, site, vocabulary, hidden);
  site->virtual_count = draw(4);
  if (site->virtual_count) site->virtual = elements(s->element, site->virtual_count * hidden);
}

// An adapter: everything now and then; if merged, dense weights of its own and no low rank at linears.
static Site *adapter(const Shape *s, const Model *m, int merged) {
  Site *sites = keep(sizeof(Site) * (size_t)m->modules);
  memset(sites, 0, sizeof(Site) * (size_t)m->modules);
  at_embedding(s, sites + m->embedding_module, m->vocabulary, m->hidden);
  at_norm(s, sites + m->final_norm_module, m->hidden);
  at_linear(s, sites + m->head_module, &m->head, merged);
  if (draw(2)) replace_some(s, sites + m->head_module, m->vocabulary, m->hidden);
  for (const Layer *l = m->layer; l < m->layer + m->layers; l++) {
    const Weight *parts[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    for (int i = Q; i <= DOWN; i++) at_linear(s, sites + l->modules[i], parts[i], merged);
    for (int i = ATTENTION_NORM; i <= MLP_NORM; i++) at_norm(s, sites + l->modules[i], m->hidden);
    for (int i = ATTENTION; i <= MLP; i++) at_block(s, sites + l->modules[i], m->hidden);
    for (int i = Q_NORM; i <= K_NORM; i++) at_norm(s, sites + l->modules[i], m->head_dim);
  }
  return sites;
}

typedef struct {
  int32_t *tokens, *position, *first, *table, *wanted, *likeliest;
  Run *run, *head_run;
} Arrays;

static int run_step(const Shape *s, const Model *m, const Step *step) {
  return s->element == 4 ? f32_forward(m, step) : bf16_forward(m, step);
}

// Every sequence in COUNTS[which] with its own adapter, null for the base; logits of the last rows. Of a
// long one the adapter changes only the rows after the first LEAD; virtual tokens stand between others.
static Step step_of(const Model *m, int which, const int *done, const Site *const *adapters) {
  long rows = 0, sequences = 0;
  for (int i = 0; i < SEQUENCES; i++) {
    rows += COUNTS[which][i];
    sequences += COUNTS[which][i] > 0;
  }
  size_t n = sizeof(int32_t), many = (size_t)sequences;
  Arrays a = {keep(n * (size_t)rows), keep(n * (size_t)rows),    keep(n * (many + 1)),
              keep(n * many * WIDTH), keep(n * many),            keep(n * many),
              keep(sizeof(Run) * 2 * many), keep(sizeof(Run) * many)};
  long row = 0, line = 0, runs = 0;
  a.first[0] = 0;
  for (int i = 0; i < SEQUENCES; i++) {
    if (!COUNTS[which][i]) continue;
    const Site *sites = adapters[(i + which) % ADAPTERS];
    long lead = COUNTS[which][i] > 5 ? LEAD : 0, stop = row + COUNTS[which][i];
    if (lead) a.run[runs++] = (Run){row, row + lead, NULL};
    a.run[runs++] = (Run){row + lead, stop, sites};
    a.head_run[line] = (Run){line, line + 1, sites};
    long virtual = sites ? sites[m->embedding_module].virtual_count : 0;
    for (int t = 0; row < stop; t++, row++) {
      int made = virtual && t >= lead && t % 2;
      a.tokens[row] = (int32_t)(made ? -1 - t % virtual : (7 * row + which) % m->vocabulary);
      a.position[row] = done[i] + t;
    }
    for (int b = 0; b < WIDTH; b++) a.table[line * WIDTH + b] = 1 + i * WIDTH + b;
    a.wanted[line] = (int32_t)row - 1;
    a.first[++line] = (int32_t)row;
  }
  return (Step){a.tokens, a.position, a.first, a.table, a.wanted, a.run, a.head_run,
                keep(sizeof(float) * many * (size_t)m->vocabulary), a.likeliest, rows, sequences,
                WIDTH, sequences, runs, sequences};
}

// Runs all steps, and keeps the logits of each.
static int run_steps(const Shape *s, const Model *m, const Site *const *adapters, float **logits) {
  int done[SEQUENCES] = {0};
  for (int which = 0; which < STEPS; which++) {
    Step step = step_of(m, which, done, adapters);
    if (run_step(s, m, &step)) return 1;
    for (long i = 0; i < step.wanted_rows; i++)
      if (step.likeliest[i] < 0) return 2;
    logits[which] = step.logits;
    for (int i = 0; i < SEQUENCES; i++) done[i] += COUNTS[which][i];
  }
  return 0;
}

static int same_on_two_threads(const Shape *s, const Model *m, const Site *const *adapters) {
  float *one[STEPS], *two[STEPS];
  team_resize(1);
  int wrong = run_steps(s, m, adapters, one);
  if (team_resize(2) != 2) return 3;
  if (!wrong) wrong = run_steps(s, m, adapters, two);
  for (int which = 0; which < STEPS && !wrong; which++) {
    long rows = 0;
    for (int i = 0; i < SEQUENCES; i++) rows += COUNTS[which][i] > 0;
    if (memcmp(one[which], two[which], sizeof(float) * (size_t)(rows * m->vocabulary))) return 4;
  }
  return wrong;
}

// Steps that would lead out of an array must be refused before anything is read there.
static int refuses(const Shape *s, const Model *m, const Site *const *adapters) {
  int done[SEQUENCES] = {0};
  Step step = step_of(m, 1, done, adapters);
  int32_t *first = (int32_t *)step.first, *tokens = (int32_t *)step.tokens;
  int32_t *position = (int32_t *)step.position, *table = (int32_t *)step.table;
  int32_t *wanted = (int32_t *)step.wanted, *base = tokens + first[1];  // leads a long sequence
  long virtual = step.run[0].sites[m->embedding_module].virtual_count;
  struct {
    int32_t *place;
    long value;
    int answer;
  } wrong[] = {
      {first, 1, BAD_ROWS},          {first + 1, 1000, BAD_ROWS},  {first + 2, 2, BAD_ROWS},
      {first + 1, -5, BAD_ROWS},     {wanted, -1, BAD_ROWS},       {wanted, step.rows, BAD_ROWS},
      {tokens, -1 - virtual, BAD_TOKEN}, {tokens, m->vocabulary, BAD_TOKEN},
      {tokens, INT32_MIN, BAD_TOKEN},    {base, -1, BAD_TOKEN},
      {position, -1, BAD_POSITION},  {position + 2, 4, BAD_POSITION},
      {position + 10, POSITIONS, BAD_POSITION},
      {table, -1, BAD_BLOCK},        {table, BLOCKS, BAD_BLOCK},
  };
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    int32_t right = *wrong[i].place;
    *wrong[i].place = (int32_t)wrong[i].value;
    int answer = run_step(s, m, &step);
    *wrong[i].place = right;
    if (answer != wrong[i].answer) {
      fprintf(stderr, "wrong step %zu: %d\n", i, answer);
      return 5;
    }
  }
  return 0;
}

// The products by themselves, with rows apart.
static int multiplies(const Shape *s, long in, long out, long rank, long rows) {
  Weight w = weight(s, in, out, s->group);
  long x_stride = in + 2, y_stride = out + 1;
  void *x = elements(s->element, (rows - 1) * x_stride + in);
  void *y = elements(s->element, (rows - 1) * y_stride + out);
  Site low = {.a = elements(s->element, rank * in), .b = elements(s->element, rank * out), .rank = rank};
  Site idle = {0};
  const Site *sites[] = {&idle, &low};
  int64_t spans[] = {0, rows / 3, rows / 3, rows};
  if (s->element == 4)
    return f32_linear(&w, x, x_stride, rows, y, y_stride) ||
           f32_low_rank(x, x_stride, in, y, y_stride, out, spans, sites, 2);
  return bf16_linear(&w, x, x_stride, rows, y, y_stride) ||
         bf16_low_rank(x, x_stride, in, y, y_stride, out, spans, sites, 2);
}

int main(void) {
  for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
    const Shape *s = SHAPES + i;
    Model m = model_of(s);
    const Site *adapters[ADAPTERS] = {NULL};
    for (int a = 1; a < ADAPTERS; a++) adapters[a] = adapter(s, &m, a == 3);
    int wrong = same_on_two_threads(s, &m, adapters);
    if (!wrong) wrong = refuses(s, &m, adapters);
    static const long ranks[] = {0, 1, 3, 5, 8};
    for (long rows = 1; rows <= 20 && !wrong; rows++)
      wrong = multiplies(s, s->hidden, 1 + 19 * rows, ranks[rows % 5], rows) ? 6 : 0;
    release();
    if (wrong) {
      fprintf(stderr, "shape %zu: %d\n", i, wrong);
      return wrong;
    }
  }
  team_resize(1);
  free(memory.start);
  return 0;
}
