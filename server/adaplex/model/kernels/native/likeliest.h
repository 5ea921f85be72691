// Included once for each element type: the likeliest token of each wanted row without its logits, by the
// screening of int8_head.h. The result is that of finite_argmax over the logits.

#define UNDECIDED INT32_MIN  // token of a row whose logits are all needed
#define OUTLIER 3.5f         // |x| above so many root mean squares of the rest count as large
#define LIFT 1.001f          // covers the rounding of a bound itself

// The sums of x * x over the small x of a row, and of |x| over the large ones.
typedef struct {
  float small_squares, large;
} NAME(Split);

// x [n]. The sums, where |x| up to `limit` is small; NaN is large.
static NAME(Split) NAME(split_sums)(const ACTIVATION *x, long n, float limit) {
  VecF32 squares = {0}, large = {0};
  for (long i = 0; i < n; i += VEC_LANES) {
    VecF32 v = ACT(load_partial)(x + i, n - i), size = select_lanes(v < 0, -v, v);
    VecI32 is_small = size <= limit;
    squares += select_lanes(is_small, v * v, (VecF32){0});
    large += select_lanes(is_small, (VecF32){0}, size);
  }
  return (NAME(Split)){sum_lanes(squares), sum_lanes(large)};
}

// x [n], x16 [stride]. x16 = x / step, rounded, zero from n on.
static void NAME(narrow_to_16)(const ACTIVATION *x, long n, float step, long stride, int16_t *x16) {
  const float inverse = 1.0f / step, to_integer = 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  for (long i = 0; i < n; i += VEC_LANES) {
    VecF32 v = ACT(load_partial)(x + i, n - i) * inverse + to_integer;
    VecI32 rounded = __builtin_convertvector(v - to_integer, VecI32);
    VecU16 narrow = __builtin_convertvector(rounded, VecU16);
    memcpy(x16 + i, &narrow, sizeof(int16_t) * (size_t)min_long(n - i, VEC_LANES));
  }
  for (long i = n; i < stride; i++) x16[i] = 0;
}

// Fills in the screening of wanted row i, whose activations are normed.
static void NAME(screen_row)(const NAME(StepTask) *task, long i) {
  const Model *m = task->model;
  const Screening *s = &task->space.screening;
  const long n = m->hidden;
  const ACTIVATION *x = (const ACTIVATION *)task->space.normed + i * n;
  const float longest = (float)m->int8_head.longest, root = sqrtf((float)n);
  VecF32 peaks = {0};
  for (long j = 0; j < n; j += VEC_LANES) {
    VecF32 v = ACT(load_partial)(x + j, n - j), size = select_lanes(v < 0, -v, v);
    peaks = max_vectors(size, peaks);
  }
  NAME(Split) split = NAME(split_sums)(x, n, INFINITY);
  float peak = max_lanes(peaks), norm = sqrtf(split.small_squares + split.large);  // NaN if an x is NaN
  // Beyond these bounds an fp32 sum may overflow, or denormals count. False for NaN.
  if (!(peak > 1e-10f && norm * longest < 1e30f)) {
    s->row[i].slack = INFINITY;
    memset(s->x16 + i * s->stride, 0, sizeof(int16_t) * (size_t)s->stride);
    return;
  }
  for (int pass = 0; pass < 2; pass++)
    split = NAME(split_sums)(x, n, OUTLIER * sqrtf(split.small_squares) / root);
  const float step = peak / 32767;
  const float rounding = ((float)n * 1.25f + 64) * 0x1p-24f;  // of the sums on both sides, times norms
  NAME(narrow_to_16)(x, n, step, s->stride, s->x16 + i * s->stride);
  s->row[i] = (ScreenedRow){.step = step,
                            .outliers = 0.5f * LIFT * split.large,
                            .rest = LIFT * sqrtf(split.small_squares),
                            .slack = LIFT * longest * (0.51f * step * root + rounding * norm)};
}

// The likeliest token of wanted row i, of the panels that may hold it; UNDECIDED if they are too many.
static int32_t NAME(likeliest_of_row)(const NAME(ProductTask) *head, const Screening *s, long i) {
  const float *upper = s->upper + i * s->panels, *lower = s->lower + i * s->panels;
  if (!(s->row[i].slack < INFINITY)) return UNDECIDED;
  float least = -INFINITY, best = -INFINITY;
  long left = SCREENED_PANELS, out = head->weight->out_features;
  for (long p = 0; p < s->panels; p++) least = lower[p] > least ? lower[p] : least;
  for (long p = 0; p < s->panels; p++) left -= upper[p] >= least;
  if (left < 0) return UNDECIDED;
  int32_t token = UNDECIDED;
  for (long p = 0; p < s->panels; p++) {
    if (upper[p] < least) continue;
    NAME(multiply_panels)(head, NULL, i, i + 1, p, p + 1);
    const float *y = head->y + i * head->y_stride;
    for (long n = p * PANEL; n < min_long(p * PANEL + PANEL, out); n++) {
      if (!(y[n] > best)) continue;
      best = y[n];
      token = (int32_t)n;
    }
  }
  return token;
}

// head: the product of the output layer. Finds the likeliest token of each wanted row; returns 0 if a row is
// undecided. A ticket is a group of panels, then a row.
static int NAME(find_likeliest)(ThreadContext *me, const NAME(StepTask) *task,
                                const NAME(ProductTask) *head) {
  const Step *step = task->step;
  const Screening *s = &task->space.screening;
  const long out = head->weight->out_features;
  for (long group; (group = team_next_ticket(&me->cursor, panel_group_count(head->weight))) >= 0;) {
    long first = group * PANEL_GROUP, last = min_long(first + PANEL_GROUP, s->panels);
    screen_panels(&task->model->int8_head, out, s, first, last);
  }
  for (long i; (i = team_next_ticket(&me->cursor, s->rows)) >= 0;)
    step->likeliest[i] = NAME(likeliest_of_row)(head, s, i);
  for (long i = 0; i < s->rows; i++)
    if (step->likeliest[i] == UNDECIDED) return 0;
  return 1;
}
