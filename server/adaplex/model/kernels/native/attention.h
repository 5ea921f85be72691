// Included once for each element type: causal attention over paged keys and values.
//
// A block has 16 tokens of one head of keys. Its keys are [dim / PER_UNIT, 16, PER_UNIT], so that a cache
// line has one unit of each token and scores need no sum over lanes; its values are
// [16 / PER_UNIT, dim, PER_UNIT], so that a cache line has one unit of neighbouring tokens for each of 16
// dimensions. Both are panels as in linear.h: scores = q K', weighted = weights V.
//
// The operations of a query do not depend on which queries are computed beside it: keys that it cannot see
// have weight zero, and values are finite.

// key [dim] -> the place of token number `token` in block [dim / PER_UNIT, 16, PER_UNIT].
INLINE void NAME(store_key)(ELEMENT *block, long token, const float *key, long dim) {
  for (long d = 0; d < dim; d++)
    block[(d / PER_UNIT * PANEL + token) * PER_UNIT + d % PER_UNIT] = NAME(narrow)(key[d]);
}

// value [dim] -> the place of token number `token` in block [16 / PER_UNIT, dim, PER_UNIT]. Stores 0 for NaN
// and the largest finite value for infinities: a weight of zero times either is NaN, which would reach the
// next owner of the block.
INLINE void NAME(store_value)(ELEMENT *block, long token, const float *value, long dim) {
  for (long d = 0; d < dim; d++) {
    float v = value[d];
    v = v != v ? 0.0f : v > LARGEST ? LARGEST : v < -LARGEST ? -LARGEST : v;
    block[(token / PER_UNIT * dim + d) * PER_UNIT + token % PER_UNIT] = NAME(narrow)(v);
  }
}

// The queries of `tokens` consecutive tokens from position `position` on, `group` heads of each, and the keys
// and values of their sequence for one head of keys.
typedef struct {
  const ACTIVATION *q;           // [tokens * group, dim]
  const ELEMENT *keys, *values;  // [blocks, 16 * dim]
  const int32_t *table;          // [blocks of the sequence]
  long tokens, group, dim, position;
  long window;  // visible keys, 0 for all
  float scale, softcap;  // see Layer
  float *scores;        // scratch [tokens * group, stride]
  ACTIVATION *weights;  // scratch [tokens * group, stride]
  long stride;          // a multiple of PANEL, at least the number of keys
  float *weighted;      // [tokens * group, dim]: the result
} NAME(HeadAttention);

// scores[row + r][t] = scale * q[row + r] keys[t], for R queries from `row` on and the tokens t of B blocks
// of the table from `b` on; `last` is the end of the table. Prefetches the next blocks of keys and the values
// of these, whose addresses hardware cannot predict.
INLINE void NAME(score_blocks)(const NAME(HeadAttention) *a, long row, long b, long last, const int R,
                               const int B) {
  const long dim = a->dim, units = dim / PER_UNIT, size = PANEL * dim;
  const ACTIVATION *q = a->q + row * dim;
  const char *line[2], *next[2], *value[2];
  UNROLL for (int i = 0; i < B; i++) {
    line[i] = (const char *)(a->keys + a->table[b + i] * size);
    next[i] = (const char *)(a->keys + a->table[min_long(b + B + i, last - 1)] * size);
    value[i] = (const char *)(a->values + a->table[b + i] * size);
  }
  Tile acc;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < B * PANEL_VECS; v++) acc[r][v] = (VecF32){0};
  for (long u = 0; u < units; u++) {
    VecU32 words[4];
    UNROLL for (int i = 0; i < B; i++) {
      UNROLL for (int v = 0; v < PANEL_VECS; v++)
        words[i * PANEL_VECS + v] = load_words(line[i] + u * 64 + v * 4 * VEC_LANES);
      prefetch(next[i] + u * 64);
      prefetch(value[i] + u * 64);
    }
    UNIT(mac_rows)(acc, 0, words, B * PANEL_VECS, q + u * PER_UNIT, dim, R);
  }
  float *scores = a->scores + row * a->stride + b * PANEL;
  const float scale = a->scale;
  const long stride = a->stride;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < B * PANEL_VECS; v++)
      f32_store(scores + r * stride + v * VEC_LANES, acc[r][v] * scale);
}

// As score_blocks, for blocks [first, last) of the table: two at a time for eight queries, which are
// compute-bound; one at a time for fewer, which are memory-bound and read consecutive lines faster.
INLINE void NAME(score_rows)(const NAME(HeadAttention) *a, long row, long first, long last, const int R) {
  long b = first;
  for (; R == 8 && b + 2 <= last; b += 2) NAME(score_blocks)(a, row, b, last, R, 2);
  for (; b < last; b++) NAME(score_blocks)(a, row, b, last, R, 1);
}

// weighted[row + r][i] = the sum of weights[row + r][t] * values[t][i] over the tokens t of blocks [first,
// last) of the table, for R queries from `row` on and 16 * D dimensions i from `d` on.
INLINE void NAME(weighted_value_lines)(const NAME(HeadAttention) *a, long row, long first, long last, long d,
                                       const int R, const int D) {
  const long dim = a->dim, stride = a->stride;
  const ACTIVATION *weights = a->weights + row * stride;
  Tile acc;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < D * PANEL_VECS; v++) acc[r][v] = (VecF32){0};
  for (long b = first; b < last; b++) {
    const char *line = (const char *)(a->values + (long)a->table[b] * PANEL * dim + d * PER_UNIT);
    for (long u = 0; u < PANEL / PER_UNIT; u++) {
      VecU32 words[4];
      UNROLL for (int v = 0; v < D * PANEL_VECS; v++)
        words[v] = load_words(line + u * dim * 4 + v * 4 * VEC_LANES);
      UNIT(mac_rows)(acc, 0, words, D * PANEL_VECS, weights + b * PANEL + u * PER_UNIT, stride, R);
    }
  }
  float *weighted = a->weighted + row * dim + d;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < D * PANEL_VECS; v++) f32_store(weighted + r * dim + v * VEC_LANES, acc[r][v]);
}

// As weighted_value_lines, for all dimensions.
INLINE void NAME(weighted_values)(const NAME(HeadAttention) *a, long row, long first, long last,
                                  const int R) {
  const int two = PANEL_VECS == 1 ? 2 : 1;
  long d = 0;
  for (; d + two * PANEL <= a->dim; d += two * PANEL)
    NAME(weighted_value_lines)(a, row, first, last, d, R, two);
  for (; d < a->dim; d += PANEL) NAME(weighted_value_lines)(a, row, first, last, d, R, 1);
}

// scores [end], weights [end]. weights[t] = exp(scores[t] - largest score) for keys [first, end), zero for
// those outside of [from, seen), which are not visible. Returns the sum of the weights.
static float NAME(softmax_weights)(float *scores, long first, long end, long from, long seen,
                                   ACTIVATION *weights) {
  const VecI32 lane = lane_numbers();
  VecF32 peaks = splat(-INFINITY), sums = {0};
  for (long t = first; t < end; t += VEC_LANES) {
    VecF32 s = f32_load(scores + t);
    if (t < from || t + VEC_LANES > seen) {
      VecI32 at = lane + (int32_t)t, visible = (at >= (int32_t)from) & (at < (int32_t)seen);
      s = select_lanes(visible, s, splat(-INFINITY));
      f32_store(scores + t, s);
    }
    peaks = select_lanes(s > peaks, s, peaks);
  }
  VecF32 peak = splat(max_lanes(peaks));
  for (long t = first; t < end; t += VEC_LANES) {
    VecF32 e = exp_lanes(f32_load(scores + t) - peak);
    sums += e;
    ACT(store)(weights + t, e);
  }
  return sum_lanes(sums);
}

#define REMAINDER(call, R) \
  case R: NAME(call)(a, r, first, last, R); break;

// Calls call(a, r, first, last, R) for groups of R = TILE_ROWS queries from query r on, then for the rest as
// one group, since each call reads all keys or values.
#if TILE_ROWS == 8
#define REMAINDERS(call) \
  REMAINDER(call, 7) REMAINDER(call, 6) REMAINDER(call, 5) REMAINDER(call, 4) \
  REMAINDER(call, 3) REMAINDER(call, 2) REMAINDER(call, 1)
#elif TILE_ROWS == 4
#define REMAINDERS(call) REMAINDER(call, 3) REMAINDER(call, 2) REMAINDER(call, 1)
#else
#define REMAINDERS(call) REMAINDER(call, 1)
#endif
#define FOR_QUERY_GROUPS(call)                                                                  \
  {                                                                                             \
    long r = 0;                                                                                 \
    for (; r + TILE_ROWS <= queries; r += TILE_ROWS) NAME(call)(a, r, first, last, TILE_ROWS); \
    switch (queries - r) { REMAINDERS(call) }                                                   \
  }

// Computes a->weighted. Keys outside of a query's window or after its position do not count.
static void NAME(attend)(const NAME(HeadAttention) *a) {
  const long queries = a->tokens * a->group, stride = a->stride, dim = a->dim;
  const long position = a->position, window = a->window;
  const long last = (position + a->tokens - 1) / PANEL + 1;
  const long first = window && position + 1 > window ? (position + 1 - window) / PANEL : 0;
  FOR_QUERY_GROUPS(score_rows)
  for (long r = 0; r < queries; r++) {
    if (a->softcap) cap_row(a->scores + r * stride + first * PANEL, (last - first) * PANEL, a->softcap);
    long seen = position + r / a->group + 1, from = window && seen > window ? seen - window : 0;
    float total = NAME(softmax_weights)(a->scores + r * stride, first * PANEL, last * PANEL, from, seen,
                                        a->weights + r * stride);
    a->scores[r * stride] = total;
  }
  FOR_QUERY_GROUPS(weighted_values)
  for (long r = 0; r < queries; r++)
    for (long d = 0; d < dim; d++) a->weighted[r * dim + d] /= a->scores[r * stride];
}
#undef FOR_QUERY_GROUPS
#undef REMAINDERS
#undef REMAINDER
