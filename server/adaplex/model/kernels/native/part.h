// Included once for each element type: one product of a step, and what its tiles ask memory for.

// One product of all rows: y = x W' + bias; for rows of adapters output_scale * y + b h + their bias.
typedef struct {
  const Weight *weight;
  const ELEMENT *x;
  long x_stride;
  float *y;
  long y_stride;
  const Site *const *sites;  // [rows] the lines of each row's adapter, null for the base; null if all are
  long module;               // which line
  ELEMENT *h;                // [rows, h_stride] a x, where the site has a rank
  long h_stride;
  int new_rows;              // whether some site replaces rows of W
  Coming *coming;            // or null
} NAME(Part);

static int NAME(share_site)(const NAME(Part) * part, long row, long rows) {
  const Site *const *sites = part->sites + row;
  for (long r = 1; r < rows; r++)
    if (sites[r] != sites[0]) return 0;
  return 1;
}

// Adds a share of what comes to what a tile asks for.
static void NAME(ask_ahead)(const NAME(Part) * part, Asks *asks) {
  Coming *coming = part->coming;
  long tile = coming->tile++, row = coming->row + tile / coming->tiles, bytes = 0;
  const Site *sites = row < coming->stop ? part->sites[row] : NULL;
  for (long i = 0; sites && i < coming->parts; i++) {
    const Site *site = sites + coming->module[i];
    if (!bytes) asks->coming = site->a;
    bytes += site->rank * coming->in * (long)sizeof(ELEMENT);
  }
  bytes /= coming->tiles;
  asks->coming += tile % coming->tiles * bytes;
  asks->pace = bytes * 8 / part->weight->in;
}

// The panels of `b` of a row from `panel` on; without any, what is in the cache anyway.
static const char *NAME(b_of)(const NAME(Part) * part, long row, long panel) {
  const Site *site = site_of(part->sites, row, part->module);
  if (!site || !site->rank) return (const char *)(part->x + row * part->x_stride);
  return (const char *)((const ELEMENT *)site->b + panel * LANES * site->rank);
}

// Fills what a tile asks for while it multiplies; not when its rows share an adapter, whose little is asked
// for at once.
static __attribute__((noinline)) int NAME(fill_asks)(const NAME(Part) * part, long row, long rows,
                                                     long panel, Asks *asks) {
  if (NAME(share_site)(part, row, rows)) {
    const char *b = NAME(b_of)(part, row, panel);
    for (long line = 0; line < PIECE; line++) expect(b + line * 64);
    return 0;
  }
  for (int i = 0; i < 8; i++)
    asks->piece[i] = NAME(b_of)(part, row + i % rows, panel) + i / rows * PIECE * 64;
  asks->coming = asks->piece[0];
  asks->pace = 0;
  if (part->coming && rows >= 4) NAME(ask_ahead)(part, asks);
  return 1;
}
