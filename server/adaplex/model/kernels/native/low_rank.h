// Included once for each element type: low-rank deltas, y += b (a x), by the adapter of each row.
//
// b [rank, out] is stored in panels of 16 output columns, like the weights of linear.h, but the last panel is
// not padded: each panel is [rank / PER_UNIT, columns] units of PER_UNIT ranks, then the last rank if the
// rank is odd. a x is rounded to elements, as torch rounds it, so that the delta is a product by b.
//
// The operations of a row and their order are the same alone and in a block of BLOCK_ROWS, so its bits do not
// depend on its neighbours.

// x [R, in], a [rank, in], h [R, rank], rows x_stride and h_stride apart.
// h[r][j + p] = a[j + p] x[r] for R rows and P ranks.
INLINE void NAME(shrink_tile)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long j, const int R,
                              const int P, ELEMENT *h, long h_stride) {
  const long step = LANES * PER_UNIT;
  F32x16 acc[BLOCK_ROWS][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (F32x16){0};
  for (long k = 0; k < in; k += step) {
    long bytes = (in - k < step ? in - k : step) * (long)sizeof(ELEMENT);
    U32x16 line[4];
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = a + (j + p) * in + k;
      line[p] = bytes == 64 ? load_words(from) : load_partial(from, bytes);
      prefetch(from + P * in);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const ELEMENT *from = x + r * x_stride + k;
      U32x16 row = bytes == 64 ? load_words(from) : load_partial(from, bytes);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], line[p], row);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) h[r * h_stride + j + p] = NAME(narrow)(sum_lanes(acc[r][p]));
}

// x [R, in], a [rank, in], h [R, rank rounded up to a whole unit]. h[r] = a x[r], zero beyond the rank.
INLINE void NAME(shrink_rows)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank,
                              const int R, ELEMENT *h, long h_stride) {
  long j = 0;
  for (; j + 4 <= rank; j += 4) NAME(shrink_tile)(x, x_stride, in, a, j, R, 4, h, h_stride);
  for (; j < rank; j++) NAME(shrink_tile)(x, x_stride, in, a, j, R, 1, h, h_stride);
  for (; j % PER_UNIT; j++)
    for (int r = 0; r < R; r++) h[r * h_stride + j] = 0;
}

// x [rows, in], a [rank, in], h [rows, rank rounded up to a whole unit]. h[row] = a x[row], zero beyond the
// rank.
static void NAME(shrink)(const ELEMENT *x, long x_stride, long in, const ELEMENT *a, long rank, long rows,
                         ELEMENT *h, long h_stride) {
  long row = 0;
  for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, BLOCK_ROWS, h + row * h_stride, h_stride);
  for (; row < rows; row++)
    NAME(shrink_rows)(x + row * x_stride, x_stride, in, a, rank, 1, h + row * h_stride, h_stride);
}

// h [R, rank], the site's b [rank, out], acc [R, P] vectors of 16 columns.
// acc[r][p] += h[r] b[.., columns of panel + p], for R rows of one adapter and P panels.
INLINE void NAME(expand)(const ELEMENT *h, long h_stride, const Site *site, long out, long panel, const int R,
                         const int P, F32x16 acc[8][4]) {
  const long units = site->rank / PER_UNIT, size = LANES * site->rank;
  const ELEMENT *b = (const ELEMENT *)site->b + panel * size;
  long width[4];
  UNROLL for (int p = 0; p < P; p++) {
    long left = out - (panel + p) * LANES;
    width[p] = left < LANES ? left : LANES;
  }
  for (long u = 0; u < units; u++) {
    U32x16 line[4];
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = b + p * size + u * width[p] * PER_UNIT;
      line[p] = width[p] == LANES ? load_words(from) : load_partial(from, width[p] * 4);
    }
    UNROLL for (int r = 0; r < R; r++) {
      U32x16 unit = NAME(broadcast_unit)(h + r * h_stride, u);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], line[p], unit);
    }
  }
#if PER_UNIT == 2
  if (site->rank % 2)
    UNROLL for (int p = 0; p < P; p++) {
      U32x16 line = (U32x16)NAME(load_partial)(b + p * size + units * width[p] * 2, width[p]) >> 16;
      UNROLL for (int r = 0; r < R; r++)
        acc[r][p] = NAME(mac)(acc[r][p], line, NAME(broadcast_unit)(h + r * h_stride, units));
    }
#endif
}
