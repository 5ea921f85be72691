// Included once for each element type: low-rank deltas, y += b (a x), of the adapter of each row.
//
// b lies in panels of 16 columns like the weights of linear.h, but without padding: of the columns that
// a panel has, units of PER_UNIT ranks, then a last odd rank by itself. So a x is rounded to elements,
// as torch rounds it, and a delta is one more product.
//
// Each row runs the same operations in the same order, whether it is computed alone or in a block
// of BLOCK_ROWS, so its bits do not depend on its neighbours.

// h[row][j] = a[j] x[row] for R rows and P ranks from `j` on. x [rows, in], a [rank, in].
INLINE void NAME(shrink_tile)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long j,
                              const int R, const int P, ELEMENT *h, long h_stride) {
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
    h[r * h_stride + j + p] = NAME(narrow)(sum_lanes(acc[r][p]));
}

INLINE void NAME(shrink_rows)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank,
                              const int R, ELEMENT *h, long h_stride) {
  long j = 0;
  for (; j + 4 <= rank; j += 4) NAME(shrink_tile)(x, x_stride, in, a, j, R, 4, h, h_stride);
  for (; j < rank; j++) NAME(shrink_tile)(x, x_stride, in, a, j, R, 1, h, h_stride);
  for (; j % PER_UNIT; j++)
    for (int r = 0; r < R; r++) h[r * h_stride + j] = 0;
}

// h[row] = a x[row], and zeros up to a whole unit.
static void NAME(shrink)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank,
                         long rows, ELEMENT *h, long h_stride) {
  long row = 0;
  for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, BLOCK_ROWS, h + row * h_stride,
                      h_stride);
  for (; row < rows; row++)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, 1, h + row * h_stride, h_stride);
}

// acc[r][p] += h[r] b, for R rows of one adapter and P panels of `out` columns.
INLINE void NAME(expand)(const ELEMENT *h, long h_stride, const Site *site, long out, long panel,
                         const int R, const int P, vec acc[8][4]) {
  const long units = site->rank / PER_UNIT, size = LANES * site->rank;
  const ELEMENT *b = (const ELEMENT *)site->b + panel * size;
  long width[4];
  UNROLL for (int p = 0; p < P; p++) {
    long left = out - (panel + p) * LANES;
    width[p] = left < LANES ? left : LANES;
  }
  for (long u = 0; u < units; u++) {
    words line[4];
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = b + p * size + u * width[p] * PER_UNIT;
      line[p] = width[p] == LANES ? load_words(from) : load_part(from, width[p] * 4);
    }
    UNROLL for (int r = 0; r < R; r++) {
      words unit = NAME(unit)(h + r * h_stride, u);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], line[p], unit);
    }
  }
#if PER_UNIT == 2
  if (site->rank % 2) UNROLL for (int p = 0; p < P; p++) {
    words line = (words)NAME(load_part)(b + p * size + units * width[p] * 2, width[p]) >> 16;
    UNROLL for (int r = 0; r < R; r++)
      acc[r][p] = NAME(mac)(acc[r][p], line, NAME(unit)(h + r * h_stride, units));
  }
#endif
}
