// Included once for each element type: causal attention over paged keys and values.
//
// A block has LANES tokens of one head of keys. Its keys are [dim / PER_UNIT, 16, PER_UNIT], so that a cache
// line has one unit of each token and scores need no sum over lanes; its values are
// [16 / PER_UNIT, dim, PER_UNIT], so that a cache line has one unit of neighbouring tokens for each of 16
// dimensions. Both are panels as in linear.h: scores = q K', weighted = weights V.
//
// The operations of a query do not depend on which queries are computed beside it: keys that it cannot see
// have weight zero, and values are finite.

// key [dim] -> the place of token number `token` in block [dim / PER_UNIT, 16, PER_UNIT].
INLINE void NAME(store_key)(ELEMENT *block, long token, const float *key, long dim) {
  for (long d = 0; d < dim; d++)
    block[(d / PER_UNIT * LANES + token) * PER_UNIT + d % PER_UNIT] = NAME(narrow)(key[d]);
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

// q [R, dim]; keys, values [blocks, 16 * dim]; table [last]; scores [R, stride].
// scores[r][t] = scale * q[r] keys[t] for R queries and the tokens t of B blocks of the table from `b` on.
// Prefetches the next blocks of keys and the values of these, whose addresses hardware cannot predict.
INLINE void NAME(score_blocks)(const ELEMENT *q, long dim, const ELEMENT *keys, const ELEMENT *values,
                               const int32_t *table, long b, long last, float scale, const int R, const int B,
                               float *scores, long stride) {
  long units = dim / PER_UNIT, size = LANES * dim;
  const char *line[2], *next[2], *value[2];
  UNROLL for (int i = 0; i < B; i++) {
    line[i] = (const char *)(keys + table[b + i] * size);
    next[i] = (const char *)(keys + table[min_long(b + B + i, last - 1)] * size);
    value[i] = (const char *)(values + table[b + i] * size);
  }
  F32x16 acc[8][2];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < B; i++) acc[r][i] = (F32x16){0};
  for (long u = 0; u < units; u++) {
    U32x16 w[2];
    UNROLL for (int i = 0; i < B; i++) {
      w[i] = load_words(line[i] + u * 64);
      prefetch(next[i] + u * 64);
      prefetch(value[i] + u * 64);
    }
    UNROLL for (int r = 0; r < R; r++) {
      U32x16 unit = NAME(broadcast_unit)(q + r * dim, u);
      UNROLL for (int i = 0; i < B; i++) acc[r][i] = NAME(mac)(acc[r][i], w[i], unit);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < B; i++) f32_store(scores + r * stride + (b + i) * LANES, acc[r][i] * scale);
}

// As score_blocks, for blocks [first, last) of the table: two at a time for eight queries, which are
// compute-bound; one at a time for fewer, which are memory-bound and read consecutive lines faster.
INLINE void NAME(score_rows)(const ELEMENT *q, long dim, const ELEMENT *keys, const ELEMENT *values,
                             const int32_t *table, long first, long last, float scale, const int R,
                             float *scores, long stride) {
  long b = first;
  for (; R == 8 && b + 2 <= last; b += 2)
    NAME(score_blocks)(q, dim, keys, values, table, b, last, scale, R, 2, scores, stride);
  for (; b < last; b++) NAME(score_blocks)(q, dim, keys, values, table, b, last, scale, R, 1, scores, stride);
}

// weights [R, stride]; values [blocks, 16 * dim]; table [last]; weighted [R, dim].
// weighted[r][i] = the sum of weights[r][t] * values[t][i] over blocks [first, last), for R queries and
// 16 * D dimensions i from `d` on.
INLINE void NAME(weighted_value_lines)(const ELEMENT *weights, long stride, const ELEMENT *values, long dim,
                                       const int32_t *table, long first, long last, long d, const int R,
                                       const int D, float *weighted) {
  F32x16 acc[8][2];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < D; i++) acc[r][i] = (F32x16){0};
  for (long b = first; b < last; b++) {
    const char *line = (const char *)(values + (long)table[b] * LANES * dim + d * PER_UNIT);
    for (long u = 0; u < LANES / PER_UNIT; u++) {
      U32x16 w[2];
      UNROLL for (int i = 0; i < D; i++) w[i] = load_words(line + u * dim * 4 + i * 64);
      UNROLL for (int r = 0; r < R; r++) {
        U32x16 unit = NAME(broadcast_unit)(weights + r * stride + b * LANES, u);
        UNROLL for (int i = 0; i < D; i++) acc[r][i] = NAME(mac)(acc[r][i], w[i], unit);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < D; i++) f32_store(weighted + r * dim + d + i * LANES, acc[r][i]);
}

// As weighted_value_lines, for all dimensions.
INLINE void NAME(weighted_values)(const ELEMENT *weights, long stride, const ELEMENT *values, long dim,
                                  const int32_t *table, long first, long last, const int R, float *weighted) {
  long d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES)
    NAME(weighted_value_lines)(weights, stride, values, dim, table, first, last, d, R, 2, weighted);
  for (; d < dim; d += LANES)
    NAME(weighted_value_lines)(weights, stride, values, dim, table, first, last, d, R, 1, weighted);
}

// scores [end], weights [end]. weights[t] = exp(scores[t] - largest score) for keys [first, end), zero for
// those outside of [from, seen), which are not visible. Returns the sum of the weights.
static float NAME(softmax_weights)(float *scores, long first, long end, long from, long seen,
                                   ELEMENT *weights) {
  const I32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F32x16 peaks = splat(-INFINITY), sums = {0};
  for (long t = first; t < end; t += LANES) {
    F32x16 s = f32_load(scores + t);
    if (t < from || t + LANES > seen) {
      I32x16 at = lane + (int32_t)t, visible = (at >= (int32_t)from) & (at < (int32_t)seen);
      s = select_lanes(visible, s, splat(-INFINITY));
      f32_store(scores + t, s);
    }
    peaks = select_lanes(s > peaks, s, peaks);
  }
  F32x16 peak = splat(max_lanes(peaks));
  for (long t = first; t < end; t += LANES) {
    F32x16 e = exp_lanes(f32_load(scores + t) - peak);
    sums += e;
    NAME(store)(weights + t, e);
  }
  return sum_lanes(sums);
}

#define REMAINDER(call, R) \
  case R: call(R); break;

// Calls call(R) for groups of eight queries, then for the rest as one group, since each call reads all keys
// or values.
#define FOR_QUERY_GROUPS(call)                \
  {                                           \
    long r = 0;                               \
    for (; r + 8 <= queries; r += 8) call(8); \
    switch (queries - r) {                    \
      REMAINDER(call, 7)                      \
      REMAINDER(call, 6)                      \
      REMAINDER(call, 5)                      \
      REMAINDER(call, 4)                      \
      REMAINDER(call, 3)                      \
      REMAINDER(call, 2)                      \
      REMAINDER(call, 1)                      \
    }                                         \
  }
#define SCORE_ROWS(R) \
  NAME(score_rows)(q + r * dim, dim, keys, values, table, first, last, scale, R, scores + r * stride, stride)
#define WEIGHTED_VALUES(R) \
  NAME(weighted_values)(weights + r * stride, stride, values, dim, table, first, last, R, weighted + r * dim)

// q [tokens * group, dim]; keys, values [blocks, 16 * dim]; table [blocks of the sequence]; scratch scores
// and weights [tokens * group, stride], stride a multiple of LANES and at least the number of keys. weighted
// [tokens * group, dim] = attention of `tokens` consecutive tokens from position `at` on, `group` heads of
// each, to one head of keys.
static void NAME(attend)(const ELEMENT *q, long tokens, long group, long dim, const ELEMENT *keys,
                         const ELEMENT *values, const int32_t *table, long at, long window, float scale,
                         float *scores, ELEMENT *weights, long stride, float *weighted) {
  long queries = tokens * group, last = (at + tokens - 1) / LANES + 1;
  long first = window && at + 1 > window ? (at + 1 - window) / LANES : 0;
  FOR_QUERY_GROUPS(SCORE_ROWS)
  for (long r = 0; r < queries; r++) {
    long seen = at + r / group + 1, from = window && seen > window ? seen - window : 0;
    float total = NAME(softmax_weights)(scores + r * stride, first * LANES, last * LANES, from, seen,
                                        weights + r * stride);
    scores[r * stride] = total;
  }
  FOR_QUERY_GROUPS(WEIGHTED_VALUES)
  for (long r = 0; r < queries; r++)
    for (long d = 0; d < dim; d++) weighted[r * dim + d] /= scores[r * stride];
}
#undef FOR_QUERY_GROUPS
#undef REMAINDER
#undef SCORE_ROWS
#undef WEIGHTED_VALUES
