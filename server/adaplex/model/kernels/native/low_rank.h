// Included once for each element type: low-rank deltas, y += b (a x), by the adapter of each row.
//
// b [rank, out] is stored in panels of 16 output columns, like the weights of linear.h, but the last panel is
// not padded: each panel is [rank / PER_UNIT, columns] units of PER_UNIT ranks, then the last rank if the
// rank is odd. a x is rounded to activations.
//
// The operations of a row and their order are the same alone and in a block of BLOCK_ROWS, so its bits do not
// depend on its neighbours.

// The product h = a x of some rows of one adapter; h is zero from the rank up to a whole unit.
typedef struct {
  const ACTIVATION *x;  // [rows, in], rows x_stride apart
  long x_stride, in_features;
  const ELEMENT *a;  // [rank, in]
  long rank;
  ACTIVATION *h;  // [rows, rank rounded up to a whole unit], rows h_stride apart
  long h_stride;
} NAME(ShrinkTask);

// h[row + r][j + p] = a[j + p] x[row + r] for R rows and P ranks.
INLINE void NAME(shrink_tile)(const NAME(ShrinkTask) *task, long row, long j, const int R, const int P) {
  const long in = task->in_features;
  const ACTIVATION *x = task->x + row * task->x_stride;
  const ELEMENT *a = task->a + j * in;
  VecF32 acc[BLOCK_ROWS][4];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (VecF32){0};
  long k = 0;
#define SHRINK_LINE(left)                                                          \
  {                                                                                \
    UNIT(Line) line[4];                                                            \
    UNROLL for (int p = 0; p < P; p++) {                                           \
      line[p] = UNIT(weights)(a + p * in + k, left);                               \
      prefetch(a + (p + P) * in + k);                                              \
    }                                                                              \
    UNROLL for (int r = 0; r < R; r++) {                                           \
      UNIT(Line) inputs = UNIT(inputs)(x + r * task->x_stride + k, left);          \
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = UNIT(dot)(acc[r][p], line[p], inputs); \
    }                                                                              \
  }
  for (; k + UNIT(LINE) <= in; k += UNIT(LINE)) SHRINK_LINE(UNIT(LINE))
  if (k < in) SHRINK_LINE(in - k)
#undef SHRINK_LINE
  ACTIVATION *h = task->h + row * task->h_stride + j;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) h[r * task->h_stride + p] = ACT(narrow)(sum_lanes(acc[r][p]));
}

// Computes h of R rows from `row` on, P ranks at a time.
INLINE void NAME(shrink_rows)(const NAME(ShrinkTask) *task, long row, const int R, const int P) {
  long j = 0;
  for (; j + P <= task->rank; j += P) NAME(shrink_tile)(task, row, j, R, P);
  for (; j < task->rank; j++) NAME(shrink_tile)(task, row, j, R, 1);
  for (; j % PER_UNIT; j++)
    for (int r = 0; r < R; r++) task->h[(row + r) * task->h_stride + j] = 0;
}

// Computes h of `rows` rows.
static void NAME(shrink)(const NAME(ShrinkTask) *task, long rows) {
  long row = 0;
  for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS)
    NAME(shrink_rows)(task, row, BLOCK_ROWS, SHRINK_RANKS);
  for (; row < rows; row++) NAME(shrink_rows)(task, row, 1, 4);
}

// h [R, rank], the site's b [rank, out], acc [R][P * PANEL_VECS] vectors of columns.
// acc[r] += h[r] b[.., columns of panels from `panel` on], for R rows of one adapter and P panels.
INLINE void NAME(expand)(const ACTIVATION *h, long h_stride, const Site *site, long out, long panel,
                         const int R, const int P, Tile acc) {
  const long units = site->rank / PER_UNIT, size = PANEL * site->rank;
  UNROLL for (int p = 0; p < P; p++) {
    const ELEMENT *b = (const ELEMENT *)site->b + (panel + p) * size;
    const long width = min_long(out - (panel + p) * PANEL, PANEL);
    for (long u = 0; u < units; u++) {
      VecU32 words[PANEL_VECS];
      UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        const ELEMENT *from = b + (u * width + v * VEC_LANES) * PER_UNIT;
        words[v] = width == PANEL ? load_words(from) : load_partial(from, (width - v * VEC_LANES) * 4);
      }
      UNIT(mac_rows)(acc, p * PANEL_VECS, words, PANEL_VECS, h + u * PER_UNIT, h_stride, R);
    }
#if PER_UNIT == 2
    if (site->rank % 2) {
      VecU32 words[PANEL_VECS];
      UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        const ELEMENT *from = b + units * width * 2 + v * VEC_LANES;
        words[v] = (VecU32)bf16_load_partial(from, width - v * VEC_LANES) >> 16;
      }
      UNIT(mac_rows)(acc, p * PANEL_VECS, words, PANEL_VECS, h + units * 2, h_stride, R);
    }
#endif
  }
}
