// Included once for each element type: ELEMENT, LOAD, STORE and NAME(x) are defined by low_rank.c.
//
// Each row runs the same operations in the same order, whether it is computed alone or in a block
// of ROW_BLOCK, so its bits do not depend on its neighbours.

// h[row][0..rank) = a x[row], for `rows` rows. x is fp32 [rows, in], a is [rank, in].
static inline __attribute__((always_inline)) void NAME(shrink)(
    const float *x, long in, const ELEMENT *a, long rank, int rows, float *h) {
  for (long j = 0; j < rank; j++) {
    vec sums[ROW_BLOCK] = {0};
    const ELEMENT *line = a + j * in;
    long k = 0;
    for (; k + LANES <= in; k += LANES) {
      vec weight = LOAD(line + k);
      for (int r = 0; r < rows; r++) sums[r] += load_f32(x + r * in + k) * weight;
    }
    for (int r = 0; r < rows; r++) {
      float tail = 0;
      for (long t = k; t < in; t++) tail += x[r * in + t] * NAME(widen)(line[t]);
      h[r * rank + j] = sum_lanes(sums[r]) + tail;
    }
  }
}

// y[row] += h[row] b, for `rows` rows. h is [rows, rank], b is [rank, out].
static inline __attribute__((always_inline)) void NAME(expand)(
    const float *h, long rank, const ELEMENT *b, long out, int rows, ELEMENT *y, long y_stride) {
  long n = 0;
  for (; n + LANES <= out; n += LANES) {
    vec sums[ROW_BLOCK];
    for (int r = 0; r < rows; r++) sums[r] = LOAD(y + r * y_stride + n);
    for (long j = 0; j < rank; j++) {
      vec weight = LOAD(b + j * out + n);
      for (int r = 0; r < rows; r++) sums[r] += h[r * rank + j] * weight;
    }
    for (int r = 0; r < rows; r++) STORE(y + r * y_stride + n, sums[r]);
  }
  for (; n < out; n++)
    for (int r = 0; r < rows; r++) {
      float sum = NAME(widen)(y[r * y_stride + n]);
      for (long j = 0; j < rank; j++) sum += h[r * rank + j] * NAME(widen)(b[j * out + n]);
      y[r * y_stride + n] = NAME(narrow)(sum);
    }
}

// y[row] += b (a x[row]) for every row of every span. x [rows, in] and y [rows, out] have row
// strides in elements; spans is [count][start, stop); table is [count][a, b, rank], addresses as
// integers, rank 0 where the span's adapter leaves this module alone. Returns 0, or -1 when
// scratch memory cannot be had (y is then untouched).
int NAME(low_rank)(const ELEMENT *x, long x_stride, long in, ELEMENT *y, long y_stride, long out,
                   const int64_t *spans, const int64_t *table, long count) {
  long widest = 0;
  for (long s = 0; s < count; s++)
    if (table[3 * s + 2] > widest) widest = table[3 * s + 2];
  if (!widest) return 0;
  float *wide = malloc(sizeof(float) * ROW_BLOCK * (in + widest));
  if (!wide) return -1;
  float *h = wide + ROW_BLOCK * in;
  for (long s = 0; s < count; s++) {
    const ELEMENT *a = (const ELEMENT *)(intptr_t)table[3 * s];
    const ELEMENT *b = (const ELEMENT *)(intptr_t)table[3 * s + 1];
    long rank = table[3 * s + 2];
    if (!rank) continue;
    for (long row = spans[2 * s]; row < spans[2 * s + 1];) {
      long left = spans[2 * s + 1] - row;
      int rows = left >= ROW_BLOCK ? ROW_BLOCK : 1;
      for (int r = 0; r < rows; r++)
        for (long k = 0; k < in; k++)
          wide[r * in + k] = NAME(widen)(x[(row + r) * x_stride + k]);
      ELEMENT *target = y + row * y_stride;
      if (rows == ROW_BLOCK) {
        NAME(shrink)(wide, in, a, rank, ROW_BLOCK, h);
        NAME(expand)(h, rank, b, out, ROW_BLOCK, target, y_stride);
      } else {
        NAME(shrink)(wide, in, a, rank, 1, h);
        NAME(expand)(h, rank, b, out, 1, target, y_stride);
      }
      row += rows;
    }
  }
  free(wide);
  return 0;
}
