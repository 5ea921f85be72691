// Included once for each element type: operations on single rows between the products.

// x, weight, dense, bias [left]; dense and bias may be null. The first `left` lanes of x * inverse * dense +
// bias, of x * inverse * weight + bias without `dense`.
INLINE VecF32 NAME(scale_normed)(const float *x, float inverse, const float *weight, const ELEMENT *dense,
                                 const ELEMENT *bias, long left) {
  VecF32 scale = dense ? NAME(load_partial)(dense, left) : f32_load_partial(weight, left);
  VecF32 y = f32_load_partial(x, left) * inverse * scale;
  return bias ? y + NAME(load_partial)(bias, left) : y;
}

// x, weight, to [n]. to = RMSNorm(x) * weight, with the weight and bias of the adapter where it has them;
// `site` is null for the base.
static void NAME(rms_norm_row)(const float *x, const float *weight, const Site *site, long n, double epsilon,
                               ACTIVATION *to) {
  const ELEMENT *dense = site ? site->dense : NULL, *bias = site ? site->bias : NULL;
  VecF32 sums = {0};
  long i = 0;
  for (; i + VEC_LANES <= n; i += VEC_LANES) {
    VecF32 v = f32_load(x + i);
    sums += v * v;
  }
  float total = sum_lanes(sums);
  for (; i < n; i++) total += x[i] * x[i];
  float inverse = 1.0f / sqrtf(total / (float)n + (float)epsilon);
#define NORMED(left) \
  NAME(scale_normed)(x + i, inverse, weight + i, dense ? dense + i : NULL, bias ? bias + i : NULL, left)
  for (i = 0; i + VEC_LANES <= n; i += VEC_LANES) ACT(store)(to + i, NORMED(VEC_LANES));
  if (i < n) ACT(store_partial)(to + i, NORMED(n - i), n - i);
#undef NORMED
}

// x, weight [n]. x = RMSNorm(x) * weight for one head, as rms_norm_row; Qwen3 norms queries and keys.
static void NAME(rms_norm_head)(float *x, const float *weight, const Site *site, long n, double epsilon) {
  const ELEMENT *dense = site ? site->dense : NULL, *bias = site ? site->bias : NULL;
  float total = 0;
  for (long i = 0; i < n; i++) total += x[i] * x[i];
  float inverse = 1.0f / sqrtf(total / (float)n + (float)epsilon);
  for (long i = 0; i < n; i += VEC_LANES)
    f32_store_partial(x + i,
                      NAME(scale_normed)(x + i, inverse, weight + i, dense ? dense + i : NULL,
                                         bias ? bias + i : NULL, n - i),
                      n - i);
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

// gate, up, to [n]. to = silu(gate) * up.
static void NAME(silu_multiply_row)(const float *gate, const float *up, long n, ACTIVATION *to) {
  long i = 0;
  for (; i + VEC_LANES <= n; i += VEC_LANES) {
    VecF32 g = f32_load(gate + i);
    ACT(store)(to + i, g / (exp_lanes(-g) + 1.0f) * f32_load(up + i));
  }
  for (; i < n; i++) {
    VecF32 g = splat(gate[i]);
    to[i] = ACT(narrow)((g / (exp_lanes(-g) + 1.0f))[0] * up[i]);
  }
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
