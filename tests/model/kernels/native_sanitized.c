// Runs small random models of odd shapes in buffers of exactly their size, for a build with sanitizers.
// Returns 0 if every step succeeds, is finite, and has the same bits on one thread and on two.

#define _GNU_SOURCE
#include <stdio.h>

#include "native_random_models.h"

enum { ADAPTERS = 5, LEAD = 2, SEQUENCES = 4, WIDTH = 4, STEPS = 5 };

static const Shape SHAPES[] = {
    {4, 1, 37, 2, 1, 16, 23, 41, 0, 0, 0, 1},    {4, 2, 48, 6, 2, 32, 259, 70, 5, 0, 1, 0},
    {2, 2, 38, 3, 1, 16, 258, 51, 19, 0, 1, 1},  {2, 1, 64, 4, 2, 16, 1090, 333, 0, 0, 0, 0},
    {2, 2, 64, 4, 4, 16, 128, 130, 16, 1, 0, 1}, {2, 1, 128, 8, 2, 64, 192, 35, 0, 1, 1, 0},
    {2, 2, 96, 6, 3, 16, 160, 51, 0, 32, 0, 1},  {2, 1, 48, 3, 1, 16, 80, 70, 0, 16, 0, 0},
    {4, 2, 64, 4, 2, 16, 136, 41, 0, 64, 0, 1},  {4, 2, 37, 2, 1, 16, 23, 41, 5, 0, 1, 0, GEMMA},
    {2, 2, 64, 4, 2, 16, 128, 70, 7, 1, 1, 0, GEMMA}, {2, 2, 64, 4, 2, 32, 136, 51, 6, 32, 0, 0, PHI},
    {4, 1, 39, 3, 1, 16, 37, 41, 0, 0, 0, 1, GPT}, {2, 2, 64, 2, 2, 32, 130, 51, 0, 0, 0, 1, GPT},
};

// Tokens of each sequence in each step.
static const int COUNTS[STEPS][SEQUENCES] = {
    {1, 0, 0, 0}, {3, 7, 1, 9}, {1, 1, 1, 1}, {0, 20, 0, 0}, {5, 1, 11, 2}};

typedef struct {
  int32_t *tokens, *position, *first, *table, *wanted, *likeliest;
  Run *run, *head_run;
} Arrays;

static int run_step(const Shape *s, const Model *m, const Step *step) {
  return s->element == 4 ? f32_forward(m, step) : bf16_forward(m, step);
}

// A step of every sequence in COUNTS[which], each with its own adapter, null for the base; logits of the last
// rows. The adapter of a long sequence changes only the rows after the first LEAD; virtual and real tokens
// alternate.
static Step step_of(const Model *m, int which, const int *done, const Site *const *adapters) {
  long rows = 0, sequences = 0;
  for (int i = 0; i < SEQUENCES; i++) {
    rows += COUNTS[which][i];
    sequences += COUNTS[which][i] > 0;
  }
  size_t n = sizeof(int32_t), many = (size_t)sequences;
  Arrays a = {allocate(n * (size_t)rows),       allocate(n * (size_t)rows),  allocate(n * (many + 1)),
              allocate(n * many * WIDTH),       allocate(n * many),          allocate(n * many),
              allocate(sizeof(Run) * 2 * many), allocate(sizeof(Run) * many)};
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
  return (Step){.tokens = a.tokens,
                .position = a.position,
                .first = a.first,
                .table = a.table,
                .wanted = a.wanted,
                .run = a.run,
                .head_run = a.head_run,
                .logits = allocate(sizeof(float) * many * (size_t)m->vocabulary),
                .likeliest = a.likeliest,
                .rows = rows,
                .sequences = sequences,
                .width = WIDTH,
                .wanted_rows = sequences,
                .runs = runs,
                .head_runs = sequences};
}

// Returns 0 if the step finds the same tokens without its logits, of which it then computes few.
static int finds_tokens(const Shape *s, const Model *m, Step step) {
  const int32_t *expected = step.likeliest;
  size_t rows = (size_t)step.wanted_rows;
  step.only_likeliest = 1;
  step.logits = allocate(sizeof(float) * rows * (size_t)m->vocabulary);
  step.likeliest = allocate(sizeof(int32_t) * rows);
  return run_step(s, m, &step) || memcmp(step.likeliest, expected, sizeof(int32_t) * rows);
}

// Runs all steps; logits [STEPS] gets the address of each step's logits.
static int run_steps(const Shape *s, const Model *m, const Site *const *adapters, float **logits) {
  int done[SEQUENCES] = {0};
  for (int which = 0; which < STEPS; which++) {
    Step step = step_of(m, which, done, adapters);
    if (run_step(s, m, &step)) return 1;
    for (long i = 0; i < step.wanted_rows; i++)
      if (step.likeliest[i] < 0) return 2;
    if (finds_tokens(s, m, step)) return 7;
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

// Returns 0 if steps whose indices lead outside of an array are refused before anything is read there.
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
      {first, 1, BAD_ROWS},
      {first + 1, 1000, BAD_ROWS},
      {first + 2, 2, BAD_ROWS},
      {first + 1, -5, BAD_ROWS},
      {wanted, -1, BAD_ROWS},
      {wanted, step.rows, BAD_ROWS},
      {tokens, -1 - virtual, BAD_TOKEN},
      {tokens, m->vocabulary, BAD_TOKEN},
      {tokens, INT32_MIN, BAD_TOKEN},
      {base, -1, BAD_TOKEN},
      {position, -1, BAD_POSITION},
      {position + 2, 4, BAD_POSITION},
      {position + 10, POSITIONS, BAD_POSITION},
      {table, -1, BAD_BLOCK},
      {table, BLOCKS, BAD_BLOCK},
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

// Calls the stand-alone products with gaps between rows; returns 0 if they succeed.
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
    const Site *none[ADAPTERS] = {NULL};
    int wrong = same_on_two_threads(s, &m, adapters);
    if (!wrong) wrong = same_on_two_threads(s, &m, none);
    if (!wrong) wrong = refuses(s, &m, adapters);
    static const long ranks[] = {0, 1, 3, 5, 8};
    for (long rows = 1; rows <= 20 && !wrong; rows++)
      wrong = multiplies(s, s->hidden, 1 + 19 * rows, ranks[rows % 5], rows) ? 6 : 0;
    free_all();
    if (wrong) {
      fprintf(stderr, "shape %zu: %d\n", i, wrong);
      return wrong;
    }
  }
  team_resize(1);
  return 0;
}
