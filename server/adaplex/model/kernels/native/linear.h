// Included once for each element type: y = x W' for a frozen W [out, in].
//
// W lies in panels of 16 output columns. Dense: [panels, in / PER_UNIT, 16] units of four bytes, each
// PER_UNIT neighbouring inputs of one column. nf4: [panels, in / 8, 32] halves, half (n, p) of line v
// holding, in nibble j, the weight of column n at input 8 v + 2 j + p; scales as in types.h.
//
// A column of a row is one chain of operations, the same alone and beside any other rows.

// R rows times P neighbouring panels.
INLINE void NAME(dense_tile)(const ELEMENT *x, long x_stride, const char *panel, long units,
                             const int R, const int P, vec acc[8][4]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long u = 0; u < units; u++) {
    words w[4];
    UNROLL for (int p = 0; p < P; p++) {
      w[p] = load_words(panel + (p * units + u) * 64);
      expect(panel + ((p + P) * units + u) * 64);
    }
    UNROLL for (int r = 0; r < R; r++) {
      words unit = NAME(unit)(x + r * x_stride, u);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], w[p], unit);
    }
  }
}

#if PER_UNIT == 2
INLINE void NAME(nf4_tile)(const ELEMENT *x, long x_stride, const char *panel, const float *scales,
                           long blocks, const int R, const int P, vec acc[8][4]) {
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long block = 0; block < blocks; block++) {
    vec part[8][4];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) part[r][p] = (vec){0};
    for (long line = 8 * block; line < 8 * block + 8; line++) {
      halves packed[4];
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = (halves)load_words(panel + (p * 8 * blocks + line) * 64);
        expect(panel + ((p + P) * 8 * blocks + line) * 64);
      }
      UNROLL for (int j = 0; j < 4; j++) {
        words w[4];
        UNROLL for (int p = 0; p < P; p++) w[p] = nf4_decode(packed[p], j);
        UNROLL for (int r = 0; r < R; r++) {
          words unit = NAME(unit)(x + r * x_stride, 4 * line + j);
          UNROLL for (int p = 0; p < P; p++) part[r][p] = NAME(mac)(part[r][p], w[p], unit);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      vec scale = f32_load(scales + (p * blocks + block) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += part[r][p] * scale;
    }
  }
}
#endif

// `dense` stands in for the weight's own panels; null takes those.
INLINE void NAME(tile)(const Weight *w, const void *dense, const ELEMENT *x, long x_stride,
                       long panel, const int R, const int P, float *y, long y_stride) {
  vec acc[8][4];
#if PER_UNIT == 2
  if (w->scales && !dense) {
    long blocks = w->in / 64;
    NAME(nf4_tile)(x, x_stride, (const char *)w->panels + panel * blocks * 512,
                   w->scales + panel * blocks * LANES, blocks, R, P, acc);
  } else
#endif
  {
    long units = w->in / PER_UNIT;
    const char *panels = dense ? dense : w->panels;
    NAME(dense_tile)(x, x_stride, panels + panel * units * 64, units, R, P, acc);
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) {
    long column = (panel + p) * LANES, left = w->out - column;
    float *target = y + r * y_stride + column;
    if (left >= LANES)
      f32_store(target, acc[r][p]);
    else
      memcpy(target, &acc[r][p], (size_t)left * sizeof(float));
  }
}

#define TILES(R, P, from, to)                                                         \
  for (long panel = from; panel < to;) {                                              \
    const ELEMENT *x_row = x + row * x_stride;                                        \
    float *y_row = y + row * y_stride;                                                \
    if (panel + P <= to) {                                                            \
      NAME(tile)(w, dense, x_row, x_stride, panel, R, P, y_row, y_stride);            \
      panel += P;                                                                     \
    } else {                                                                          \
      NAME(tile)(w, dense, x_row, x_stride, panel, R, 1, y_row, y_stride);            \
      panel++;                                                                        \
    }                                                                                 \
  }

// y[rows, columns of panels [first, last)] = x W'. Two panels stay in the cache for all rows.
static void NAME(panels)(const Weight *w, const void *dense, const ELEMENT *x, long x_stride,
                         long rows, long first, long last, float *y, long y_stride) {
  long eights = rows - rows % 8, row = 0;
  for (long pair = first; pair < last; pair += 2) {
    long end = pair + 2 < last ? pair + 2 : last;
    for (row = 0; row < eights; row += 8) TILES(8, 2, pair, end)
  }
  row = eights;
  if (rows - row >= 4) {
    TILES(4, 4, first, last)
    row += 4;
  }
  if (rows - row >= 2) {
    TILES(2, 4, first, last)
    row += 2;
  }
  if (rows - row) TILES(1, 4, first, last)
}
#undef TILES
