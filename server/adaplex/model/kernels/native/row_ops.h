// Included once for each element type: operations on single rows between the products.

// A norm of one row, with the changes of the row's adapter.
typedef struct {
  const float *weight, *bias;
  const ELEMENT *dense, *shift;  // of the adapter, or null: what replaces weight - offset; a further bias
  float mean, inverse, offset;   // inverse: 1 / sqrt(variance + epsilon)
} NAME(RowNorm);

// x [n]. The norm of x; `site` is null for the base.
static NAME(RowNorm) NAME(measure_row)(const float *x, const Norm *norm, const Site *site, long n) {
  NAME(RowNorm) row = {.weight = norm->weight,
                       .bias = norm->bias,
                       .dense = site ? site->dense : NULL,
                       .shift = site ? site->bias : NULL,
                       .offset = (float)norm->offset};
  VecF32 sums = {0};
  float total = 0;
  long whole = n - n % VEC_LANES;
  if (norm->centered) {
    for (long i = 0; i < whole; i += VEC_LANES) sums += f32_load(x + i);
    total = sum_lanes(sums);
    for (long i = whole; i < n; i++) total += x[i];
    row.mean = total / (float)n;
    sums = (VecF32){0};
  }
  for (long i = 0; i < whole; i += VEC_LANES) {
    VecF32 v = f32_load(x + i) - row.mean;
    sums += v * v;
  }
  total = sum_lanes(sums);
  for (long i = whole; i < n; i++) total += (x[i] - row.mean) * (x[i] - row.mean);
  row.inverse = 1.0f / sqrtf(total / (float)n + (float)norm->epsilon);
  return row;
}

// x [left]: the elements of a row from number i on. The first `left` lanes of their norm.
INLINE VecF32 NAME(normed)(const NAME(RowNorm) *row, const float *x, long i, long left) {
  VecF32 scale = row->dense ? NAME(load_partial)(row->dense + i, left) + row->offset
                            : f32_load_partial(row->weight + i, left);
  VecF32 shift = row->bias ? f32_load_partial(row->bias + i, left) : (VecF32){0};
  if (row->shift) shift += NAME(load_partial)(row->shift + i, left);
  return (f32_load_partial(x, left) - row->mean) * row->inverse * scale + shift;
}

// x, to [n]. to = norm of x; `site` is null for the base.
static void NAME(norm_row)(const float *x, const Norm *norm, const Site *site, long n, ACTIVATION *to) {
  const NAME(RowNorm) row = NAME(measure_row)(x, norm, site, n);
  long i = 0;
  for (; i + VEC_LANES <= n; i += VEC_LANES) ACT(store)(to + i, NAME(normed)(&row, x + i, i, VEC_LANES));
  if (i < n) ACT(store_partial)(to + i, NAME(normed)(&row, x + i, i, n - i), n - i);
}

// x [n]. x = norm of x, as norm_row.
static void NAME(norm_in_place)(float *x, const Norm *norm, const Site *site, long n) {
  const NAME(RowNorm) row = NAME(measure_row)(x, norm, site, n);
  for (long i = 0; i < n; i += VEC_LANES)
    f32_store_partial(x + i, NAME(normed)(&row, x + i, i, n - i), n - i);
}

// x [n]; cosines, sines [n / 2]. Applies the rotary position embedding to one head, in place: rotates the
// pairs of elements i and i + n / 2.
static void NAME(rope_head)(float *x, const float *cosines, const float *sines, long n) {
  long half = n / 2;
  for (long i = 0; i < half; i++) {
    float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i] + first * sines[i];
  }
}

// gate, up, to [n]. to = activation(gate) * up; activation(gate) if `up` is null.
static void NAME(gate_row)(const float *gate, const float *up, int activation, long n, ACTIVATION *to) {
#define GATED(left)                                                        \
  VecF32 y = activate_lanes(f32_load_partial(gate + i, left), activation); \
  if (up) y *= f32_load_partial(up + i, left);
  long i = 0;
  for (; i + VEC_LANES <= n; i += VEC_LANES) {
    GATED(VEC_LANES)
    ACT(store)(to + i, y);
  }
  if (i < n) {
    GATED(n - i)
    ACT(store_partial)(to + i, y, n - i);
  }
#undef GATED
}

// x [n] of type From, to [n] of type To. to = x, rounded. FROM(x) and TO(x) are x with the types' prefixes.
#define DEFINE_CONVERSION(name, From, FROM, To, TO)                                  \
  static void NAME(name)(const From *x, long n, To *to) {                            \
    long i = 0;                                                                      \
    for (; i + VEC_LANES <= n; i += VEC_LANES) TO(store)(to + i, FROM(load)(x + i)); \
    for (; i < n; i++) to[i] = TO(narrow)(FROM(widen)(x[i]));                        \
  }

DEFINE_CONVERSION(widen_row, ELEMENT, NAME, float, F32)
DEFINE_CONVERSION(narrow_row, float, F32, ELEMENT, NAME)
DEFINE_CONVERSION(activation_row, ELEMENT, NAME, ACTIVATION, ACT)
DEFINE_CONVERSION(round_row, float, F32, ACTIVATION, ACT)
#undef DEFINE_CONVERSION
