// Included once for each element type: low-rank deltas, y += b (a x), by the adapter of each row.
//
// b [rank, out] is stored in panels of 16 output columns, like the weights of linear.h, but the last panel is
// not padded: each panel is [rank / PER_UNIT, columns] units of PER_UNIT ranks, then the last rank if the
// rank is odd. a x is rounded to elements, as torch rounds it, so that the delta is a product by b.
//
// The operations of a row and their order are the same alone and in a block of BLOCK_ROWS, so its bits do not
// depend on its neighbours.

// The product h = a x of some rows of one adapter; h is zero from the rank up to a whole unit.
typedef struct {
  const ELEMENT *x;  // [rows, in], rows x_stride apart
  long x_stride, in_features;
  const ELEMENT *a;  // [rank, in]
  long rank;
  ELEMENT *h;  // [rows, rank rounded up to a whole unit], rows h_stride apart
  long h_stride;
} NAME(ShrinkTask);

// h[row + r][j + p] = a[j + p] x[row + r] for R rows and P ranks.
INLINE void NAME(shrink_tile)(NAME(ShrinkTask) task, long row, long j, const int R, const int P) {
  const long step = LANES * PER_UNIT, in = task.in_features;
  const ELEMENT *x = task.x + row * task.x_stride;
  F32x16 acc[BLOCK_ROWS][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (F32x16){0};
  for (long k = 0; k < in; k += step) {
    long bytes = (in - k < step ? in - k : step) * (long)sizeof(ELEMENT);
    U32x16 line[4];
    UNROLL for (int p = 0; p < P; p++) {
      const ELEMENT *from = task.a + (j + p) * in + k;
      line[p] = bytes == 64 ? load_words(from) : load_partial(from, bytes);
      prefetch(from + P * in);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const ELEMENT *from = x + r * task.x_stride + k;
      U32x16 part = bytes == 64 ? load_words(from) : load_partial(from, bytes);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], line[p], part);
    }
  }
  ELEMENT *h = task.h + row * task.h_stride + j;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) h[r * task.h_stride + p] = NAME(narrow)(sum_lanes(acc[r][p]));
}

// Computes h of R rows from `row` on.
INLINE void NAME(shrink_rows)(NAME(ShrinkTask) task, long row, const int R) {
  long j = 0;
  for (; j + 4 <= task.rank; j += 4) NAME(shrink_tile)(task, row, j, R, 4);
  for (; j < task.rank; j++) NAME(shrink_tile)(task, row, j, R, 1);
  for (; j % PER_UNIT; j++)
    for (int r = 0; r < R; r++) task.h[(row + r) * task.h_stride + j] = 0;
}

// Computes h of `rows` rows.
static void NAME(shrink)(NAME(ShrinkTask) task, long rows) {
  long row = 0;
  for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS) NAME(shrink_rows)(task, row, BLOCK_ROWS);
  for (; row < rows; row++) NAME(shrink_rows)(task, row, 1);
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
