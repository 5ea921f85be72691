// Included once for each element type: low-rank deltas, y += b (a x), of the adapter of each row.
//
// Each row runs the same operations in the same order, whether it is computed alone or in a block
// of BLOCK_ROWS, so its bits do not depend on its neighbours.

// h[row][j] = a[j] x[row] for R rows and P ranks from `j` on. x [rows, in], a [rank, in].
INLINE void NAME(shrink_tile)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long j,
                              const int R, const int P, float *h, long h_stride) {
  const long step = LANES * PER_UNIT;
  vec acc[BLOCK_ROWS][4];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long k = 0; k < in; k += step) {
    long bytes = (in - k < step ? in - k : step) * (long)sizeof(ELEMENT);
    words line[4];
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = a + (j + p) * in + k;
      line[p] = bytes == 64 ? load_words(from) : load_part(from, bytes);
      expect(from + P * in);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const ELEMENT *from = x + r * x_stride + k;
      words row = bytes == 64 ? load_words(from) : load_part(from, bytes);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], line[p], row);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
    h[r * h_stride + j + p] = sum_lanes(acc[r][p]);
}

INLINE void NAME(shrink_rows)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank,
                              const int R, float *h, long h_stride) {
  long j = 0;
  for (; j + 4 <= rank; j += 4) NAME(shrink_tile)(x, x_stride, in, a, j, R, 4, h, h_stride);
  for (; j < rank; j++) NAME(shrink_tile)(x, x_stride, in, a, j, R, 1, h, h_stride);
}

static void NAME(shrink)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank,
                         long rows, float *h, long h_stride) {
  long row = 0;
  for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, BLOCK_ROWS, h + row * h_stride,
                      h_stride);
  for (; row < rows; row++)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, 1, h + row * h_stride, h_stride);
}

// y[row][n .. n + 16 P) += h[row] b for R rows. h [rows, rank], b [rank, out].
INLINE void NAME(expand_tile)(const float *h, long h_stride, long rank, const ELEMENT *b, long out,
                              long n, const int R, const int P, float *y, long y_stride) {
  vec acc[BLOCK_ROWS][4];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
    acc[r][p] = f32_load(y + r * y_stride + n + LANES * p);
  for (long j = 0; j < rank; j++) {
    vec line[4];
    UNROLL for (int p = 0; p < P; p++) line[p] = NAME(load)(b + j * out + n + LANES * p);
    expect(b + j * out + n + LANES * P);
    expect(b + j * out + n + LANES * P + 64 / sizeof(ELEMENT));
    UNROLL for (int r = 0; r < R; r++) {
      vec weight = splat(h[r * h_stride + j]);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] += weight * line[p];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
    f32_store(y + r * y_stride + n + LANES * p, acc[r][p]);
}

INLINE void NAME(expand_rows)(const float *h, long h_stride, long rank, const ELEMENT *b, long out,
                              long from, long to, const int R, float *y, long y_stride) {
  long n = from;
  for (; n + 4 * LANES <= to; n += 4 * LANES)
    NAME(expand_tile)(h, h_stride, rank, b, out, n, R, 4, y, y_stride);
  for (; n + LANES <= to; n += LANES)
    NAME(expand_tile)(h, h_stride, rank, b, out, n, R, 1, y, y_stride);
  for (; n < to; n++)
    for (int r = 0; r < R; r++) {
      float sum = y[r * y_stride + n];
      for (long j = 0; j < rank; j++)
        sum = fmaf(h[r * h_stride + j], NAME(widen)(b[j * out + n]), sum);
      y[r * y_stride + n] = sum;
    }
}

// Columns [from, to) of `rows` rows, at most BLOCK_ROWS.
static void NAME(expand)(const float *h, long h_stride, long rank, const ELEMENT *b, long out,
                         long from, long to, long rows, float *y, long y_stride) {
  if (rows == BLOCK_ROWS) {
    NAME(expand_rows)(h, h_stride, rank, b, out, from, to, BLOCK_ROWS, y, y_stride);
    return;
  }
  for (long row = 0; row < rows; row++)
    NAME(expand_rows)(h + row * h_stride, h_stride, rank, b, out, from, to, 1,
                      y + row * y_stride, y_stride);
}
