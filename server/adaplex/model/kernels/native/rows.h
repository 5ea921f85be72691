// Included once for each element type: what happens to single rows between the products.

// The first `left` lanes of weight * x * inverse, by the adapter's weight and with its bias where it has them.
INLINE vec NAME(normed)(const float *x, float inverse, const float *weight, const ELEMENT *dense,
                        const ELEMENT *bias, long left) {
  vec scale = dense ? NAME(load_part)(dense, left) : f32_load_part(weight, left);
  vec y = f32_load_part(x, left) * inverse * scale;
  return bias ? y + NAME(load_part)(bias, left) : y;
}

// RMSNorm: to[i] = weight[i] * x[i] / rms(x), and what the adapter does there; `site` is null for the base.
static void NAME(norm_row)(const float *x, const float *weight, const Site *site, long n, double epsilon,
                           ELEMENT *to) {
  const ELEMENT *dense = site ? site->dense : NULL, *bias = site ? site->bias : NULL;
  vec sums = {0};
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec v = f32_load(x + i);
    sums += v * v;
  }
  float total = sum_lanes(sums);
  for (; i < n; i++) total += x[i] * x[i];
  float inverse = 1.0f / sqrtf(total / (float)n + (float)epsilon);
#define NORMED(left) \
  NAME(normed)(x + i, inverse, weight + i, dense ? dense + i : NULL, bias ? bias + i : NULL, left)
  for (i = 0; i + LANES <= n; i += LANES) NAME(store)(to + i, NORMED(LANES));
  if (i < n) NAME(store_part)(to + i, NORMED(n - i), n - i);
#undef NORMED
}

// The same within one head, in place: Qwen3 norms queries and keys.
static void NAME(norm_head)(float *x, const float *weight, const Site *site, long n, double epsilon) {
  const ELEMENT *dense = site ? site->dense : NULL, *bias = site ? site->bias : NULL;
  float total = 0;
  for (long i = 0; i < n; i++) total += x[i] * x[i];
  float inverse = 1.0f / sqrtf(total / (float)n + (float)epsilon);
  for (long i = 0; i < n; i += LANES)
    f32_store_part(x + i,
                   NAME(normed)(x + i, inverse, weight + i, dense ? dense + i : NULL,
                                bias ? bias + i : NULL, n - i),
                   n - i);
}

// Rotary position embedding of one head in place: element i turns with element i + n / 2.
static void NAME(rotate_head)(float *x, const float *cosines, const float *sines, long n) {
  long half = n / 2;
  for (long i = 0; i < half; i++) {
    float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i] + first * sines[i];
  }
}

// to[i] = silu(gate[i]) * up[i].
static void NAME(gated)(const float *gate, const float *up, long n, ELEMENT *to) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) {
    vec g = f32_load(gate + i);
    NAME(store)(to + i, g / (exp_lanes(-g) + 1.0f) * f32_load(up + i));
  }
  for (; i < n; i++) {
    vec g = splat(gate[i]);
    to[i] = NAME(narrow)((g / (exp_lanes(-g) + 1.0f))[0] * up[i]);
  }
}

static void NAME(widen_row)(const ELEMENT *x, long n, float *to) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) f32_store(to + i, NAME(load)(x + i));
  for (; i < n; i++) to[i] = NAME(widen)(x[i]);
}

static void NAME(narrow_row)(const float *x, long n, ELEMENT *to) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) NAME(store)(to + i, f32_load(x + i));
  for (; i < n; i++) to[i] = NAME(narrow)(x[i]);
}
