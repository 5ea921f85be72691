// Included once for each element type: y = x W' for a frozen W [out, in], plus what adapters add to it.
//
// W lies in panels of 16 output columns. Dense: [panels, in / PER_UNIT, 16] units of four bytes, each
// PER_UNIT neighbouring inputs of one column. nf4: [panels, in / 8, 32] halves, half (n, p) of line v
// holding, in nibble j, the weight of column n at input 8 v + 2 j + p; scales as in types.h. int4: the
// same with other codes and scales; see int4.h.
//
// A column of a row is one chain of operations, the same alone and beside any other rows.

// R rows times P neighbouring panels.
INLINE void NAME(dense_tile)(const ELEMENT *x, long x_stride, const char *panel, long units,
                             const Asks *asks, Turn turn, const int R, const int P,
                             vec acc[8][4]) {
  const char *next = share_of(panel + P * units * 64, units, turn);
  const long pace = pace_of(turn);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long u = 0; u < units; u++) {
    words w[4];
    if (asks && u % (8 / PER_UNIT) == 0) ask(asks, u / (8 / PER_UNIT));
    UNROLL for (int p = 0; p < P; p++) {
      w[p] = load_words(panel + (p * units + u) * 64);
      expect(next + p * units * 64 + u * pace);
    }
    UNROLL for (int r = 0; r < R; r++) {
      words unit = NAME(unit)(x + r * x_stride, u);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = NAME(mac)(acc[r][p], w[p], unit);
    }
  }
}

#if PER_UNIT == 2
INLINE void NAME(nf4_tile)(const ELEMENT *x, long x_stride, const char *panel, const float *scales,
                           long blocks, const Asks *asks, Turn turn, const int R, const int P,
                           vec acc[8][4]) {
  const char *next = share_of(panel + P * blocks * 512, 8 * blocks, turn);
  const long pace = pace_of(turn);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long block = 0; block < blocks; block++) {
    vec part[8][4];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) part[r][p] = (vec){0};
    for (long line = 8 * block; line < 8 * block + 8; line++) {
      halves packed[4];
      if (asks) ask(asks, line);
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = (halves)load_words(panel + (p * 8 * blocks + line) * 64);
        expect(next + p * blocks * 512 + line * pace);
      }
      UNROLL for (int j = 0; j < 4; j++) {
        words w[4];
        UNROLL for (int p = 0; p < P; p++) w[p] = look_up(&NF4, packed[p], j);
        UNROLL for (int r = 0; r < R; r++) {
          words unit = NAME(unit)(x + r * x_stride, 4 * line + j);
          UNROLL for (int p = 0; p < P; p++) part[r][p] = NAME(mac)(part[r][p], w[p], unit);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      expect(scales + ((p + P) * blocks + block) * LANES);
      vec scale = f32_load(scales + (p * blocks + block) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += part[r][p] * scale;
    }
  }
}
#endif

INLINE float NAME(dot)(const ELEMENT *x, const ELEMENT *y, long n) {
  const long step = LANES * PER_UNIT;
  vec acc = {0};
  for (long i = 0; i < n; i += step) {
    long bytes = at_most(n - i, step) * (long)sizeof(ELEMENT);
    acc = NAME(mac)(acc, load_part(x + i, bytes), load_part(y + i, bytes));
  }
  return sum_lanes(acc);
}

// Columns of `panels` whose row of W the adapter replaces: y anew, from its row.
static void NAME(replace_columns)(const NAME(Part) * part, const Site *site, long row, long panel,
                                  long panels) {
  const Weight *w = part->weight;
  float *y = part->y + row * part->y_stride;
  for (long j = first_row(site, panel * LANES); j < site->row_count; j++) {
    long column = site->row_ids[j];
    if (column >= (panel + panels) * LANES) return;
    y[column] = NAME(dot)(part->x + row * part->x_stride, (const ELEMENT *)site->rows + j * w->in, w->in);
    if (w->bias) y[column] += w->bias[column];
  }
}

// y = output_scale * y + b h + bias of the adapter, for R rows of one, P panels.
INLINE void NAME(add_adapter)(const NAME(Part) * part, const Site *site, long row, long panel, const int R,
                              const int P) {
  long column = panel * LANES, out = part->weight->out;
  float *y = part->y + row * part->y_stride + column;
  vec acc[8][4];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
    acc[r][p] = f32_load_part(y + r * part->y_stride + p * LANES, out - column - p * LANES);
  if (site->output_scale) UNROLL for (int p = 0; p < P; p++) {
    const ELEMENT *from = (const ELEMENT *)site->output_scale + column + p * LANES;
    vec scale = NAME(load_part)(from, out - column - p * LANES);
    UNROLL for (int r = 0; r < R; r++) acc[r][p] *= scale;
  }
  NAME(expand)(part->h + row * part->h_stride, part->h_stride, site, out, panel, R, P, acc);
  if (site->bias) UNROLL for (int p = 0; p < P; p++) {
    const ELEMENT *from = (const ELEMENT *)site->bias + column + p * LANES;
    vec shift = NAME(load_part)(from, out - column - p * LANES);
    UNROLL for (int r = 0; r < R; r++) acc[r][p] += shift;
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)
    f32_store_part(y + r * part->y_stride + p * LANES, acc[r][p], out - column - p * LANES);
}

// The same for the rows of a tile, whoever their adapters are. Not in line: the tile needs the registers.
static __attribute__((noinline)) void NAME(add_adapters)(const NAME(Part) * part, long row, long rows,
                                                         long panel, long panels) {
  for (long r = 0; part->new_rows && r < rows; r++) {
    const Site *site = site_of(part->sites, row + r, part->module);
    if (site) NAME(replace_columns)(part, site, row + r, panel, panels);
  }
  if (rows == 8 && panels == 2 && NAME(share_site)(part, row, rows)) {
    const Site *site = site_of(part->sites, row, part->module);
    if (site) NAME(add_adapter)(part, site, row, panel, 8, 2);
    return;
  }
  for (long last = row + rows; row < last; row++) {
    const Site *site = site_of(part->sites, row, part->module);
    for (long p = 0; site && p < panels; p += 2)
      if (p + 2 <= panels)
        NAME(add_adapter)(part, site, row, panel + p, 1, 2);
      else
        NAME(add_adapter)(part, site, row, panel + p, 1, 1);
  }
}

// What `own` has stands in for the weight's own panels or zeros; null takes those.
INLINE void NAME(tile)(const NAME(Part) * part, const Site *own, long row, Turn turn, long panel,
                       const int R, const int P) {
  const Weight *w = part->weight;
  const ELEMENT *x = part->x + row * part->x_stride;
  Asks wanted;
  const Asks *asks = part->sites && NAME(fill_asks)(part, row, R, panel, &wanted) ? &wanted : NULL;
  vec acc[8][4];
  const void *dense = own ? own->dense : NULL;
  if (w->group && !dense) {
    const float *zeros = own ? own->zeros : w->zeros;
    NAME(int4_tile)(x, part->x_stride, w, zeros, panel, asks, turn, R, P, acc);
  } else
#if PER_UNIT == 2
  if (w->scales && !dense) {
    long blocks = w->in / 64;
    NAME(nf4_tile)(x, part->x_stride, (const char *)w->panels + panel * blocks * 512,
                   w->scales + panel * blocks * LANES, blocks, asks, turn, R, P, acc);
  } else
#endif
  {
    long units = w->in / PER_UNIT;
    const char *panels = dense ? dense : w->panels;
    NAME(dense_tile)(x, part->x_stride, panels + panel * units * 64, units, asks, turn, R, P, acc);
  }
  if (w->bias) UNROLL for (int p = 0; p < P; p++) {
    long column = (panel + p) * LANES;
    vec bias = f32_load_part(w->bias + column, w->out - column);
    UNROLL for (int r = 0; r < R; r++) acc[r][p] += bias;
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) {
    long column = (panel + p) * LANES;
    f32_store_part(part->y + (row + r) * part->y_stride + column, acc[r][p], w->out - column);
  }
  if (part->sites) NAME(add_adapters)(part, row, R, panel, P);
}

#define TILES(R, P, from, to)                        \
  for (long panel = from; panel < to;) {             \
    if (panel + P <= to) {                           \
      NAME(tile)(part, own, row, turn, panel, R, P); \
      panel += P;                                    \
    } else {                                         \
      NAME(tile)(part, own, row, turn, panel, R, 1); \
      panel++;                                       \
    }                                                \
  }

#define REST(R, P)           \
  case R:                    \
    TILES(R, P, first, last) \
    break;

// Rows [row, stop) of the columns of panels [first, last). Two panels stay in the cache for all rows; what
// is left of eight rows goes in one pass, since each pass decodes the weight anew.
static void NAME(panels)(const NAME(Part) * part, const Site *own, long row, long stop, long first,
                         long last) {
  long start = row, eights = row + (stop - row) / 8 * 8;
  Turn turn = {0, (stop - row) / 8};
  for (long pair = first; pair < last; pair += 2) {
    long end = pair + 2 < last ? pair + 2 : last;
    turn.mine = 0;
    for (row = start; row < eights; row += 8, turn.mine++) TILES(8, 2, pair, end)
  }
  row = eights;
  turn = (Turn){0, 1};
  switch (stop - row) {
    REST(7, 2)
    REST(6, 2)
    REST(5, 2)
    REST(4, 2)
    REST(3, 2)
    REST(2, 4)
    REST(1, 4)
  }
}
#undef REST
#undef TILES
