// Small random models of odd shapes in buffers of exactly their size, for a build with sanitizers.
// Ends with 0 if no step fails, is not finite, or has other bits on two threads than on one.

#define _GNU_SOURCE
#include <stdio.h>

#include "kernels.c"

enum { ADAPTERS = 5, MODULES = 22, SEQUENCES = 4, BLOCKS = 17, WIDTH = 4, POSITIONS = 64, STEPS = 5 };

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
    for (int part = 0; part < 7; part++) layers[i].modules[part] = 1 + 7 * i + part;
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
      .modules = 1 + 7 * s->layers,
      .head_module = 0,
      .epsilon = 1e-5,
      .scale = 0.25,
  };
}

// An adapter: low rank, now and then a bias; or, if merged, dense weights of its own.
static Site *adapter(const Shape *s, const Model *m, int merged) {
  static const long ranks[] = {0, 1, 3, 5, 8};
  Site *sites = keep(sizeof(Site) * (size_t)m->modules);
  memset(sites, 0, sizeof(Site) * (size_t)m->modules);
  for (long i = 0; i < m->modules; i++) {
    const Layer *l = m->layer + (i ? (i - 1) / 7 : 0);
    const Weight *parts[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    const Weight *w = i ? parts[(i - 1) % 7] : &m->head;
    long rank = ranks[draw(5)];
    if (merged && w->group && rank > 2) sites[i].zeros = groups(4, w->in / w->group, w->out);
    else if (merged && rank) sites[i].dense = dense_panels(s, w->in, w->out);
    if (!merged && rank) {
      sites[i].a = elements(s->element, rank * w->in);
      sites[i].b = elements(s->element, rank * w->out);
      sites[i].rank = rank;
    }
    if (draw(2)) sites[i].bias = elements(s->element, w->out);
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

// Every sequence in COUNTS[which] with its own adapter, null for the base; logits of the last rows.
static Step step_of(const Model *m, int which, const int *done, const Site *const *adapters) {
  long rows = 0, sequences = 0;
  for (int i = 0; i < SEQUENCES; i++) {
    rows += COUNTS[which][i];
    sequences += COUNTS[which][i] > 0;
  }
  size_t n = sizeof(int32_t), many = (size_t)sequences;
  Arrays a = {keep(n * (size_t)rows), keep(n * (size_t)rows),    keep(n * (many + 1)),
              keep(n * many * WIDTH), keep(n * many),            keep(n * many),
              keep(sizeof(Run) * many), keep(sizeof(Run) * many)};
  long row = 0, line = 0;
  a.first[0] = 0;
  for (int i = 0; i < SEQUENCES; i++) {
    if (!COUNTS[which][i]) continue;
    a.run[line] = (Run){row, row + COUNTS[which][i], adapters[(i + which) % ADAPTERS]};
    a.head_run[line] = (Run){line, line + 1, a.run[line].sites};
    for (int t = 0; t < COUNTS[which][i]; t++, row++) {
      a.tokens[row] = (int32_t)((7 * row + which) % m->vocabulary);
      a.position[row] = done[i] + t;
    }
    for (int b = 0; b < WIDTH; b++) a.table[line * WIDTH + b] = 1 + i * WIDTH + b;
    a.wanted[line] = (int32_t)row - 1;
    a.first[++line] = (int32_t)row;
  }
  return (Step){a.tokens, a.position, a.first, a.table, a.wanted, a.run, a.head_run,
                keep(sizeof(float) * many * (size_t)m->vocabulary), a.likeliest, rows, sequences,
                WIDTH, sequences, sequences, sequences};
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
  int32_t *wanted = (int32_t *)step.wanted;
  struct {
    int32_t *place;
    long value;
    int answer;
  } wrong[] = {
      {first, 1, BAD_ROWS},          {first + 1, 1000, BAD_ROWS},  {first + 2, 2, BAD_ROWS},
      {first + 1, -5, BAD_ROWS},     {wanted, -1, BAD_ROWS},       {wanted, step.rows, BAD_ROWS},
      {tokens, -1, BAD_TOKEN},       {tokens, m->vocabulary, BAD_TOKEN},
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
  Site low = {elements(s->element, rank * in), elements(s->element, rank * out), rank, NULL, NULL};
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
