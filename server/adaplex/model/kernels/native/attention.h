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

// The queries of `tokens` consecutive tokens from position `position` on, `group` heads of each, and the keys
// and values of their sequence for one head of keys.
typedef struct {
  const ELEMENT *q;              // [tokens * group, dim]
  const ELEMENT *keys, *values;  // [blocks, 16 * dim]
  const int32_t *table;          // [blocks of the sequence]
  long tokens, group, dim, position;
  long window;  // visible keys, 0 for all
  float scale;
  float *scores;     // scratch [tokens * group, stride]
  ELEMENT *weights;  // scratch [tokens * group, stride]
  long stride;       // a multiple of LANES, at least the number of keys
  float *weighted;   // [tokens * group, dim]: the result
} NAME(HeadAttention);

// scores[row + r][t] = scale * q[row + r] keys[t], for R queries from `row` on and the tokens t of B blocks
// of the table from `b` on; `last` is the end of the table. Prefetches the next blocks of keys and the values
// of these, whose addresses hardware cannot predict.
INLINE void NAME(score_blocks)(const NAME(HeadAttention) *a, long row, long b, long last, const int R,
                               const int B) {
  const long dim = a->dim, units = dim / PER_UNIT, size = LANES * dim;
  const ELEMENT *q = a->q + row * dim;
  const char *line[2], *next[2], *value[2];
  UNROLL for (int i = 0; i < B; i++) {
    line[i] = (const char *)(a->keys + a->table[b + i] * size);
    next[i] = (const char *)(a->keys + a->table[min_long(b + B + i, last - 1)] * size);
    value[i] = (const char *)(a->values + a->table[b + i] * size);
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
  float *scores = a->scores + row * a->stride;
  const float scale = a->scale;
  const long stride = a->stride;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < B; i++) f32_store(scores + r * stride + (b + i) * LANES, acc[r][i] * scale);
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
  const ELEMENT *weights = a->weights + row * stride;
  F32x16 acc[8][2];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < D; i++) acc[r][i] = (F32x16){0};
  for (long b = first; b < last; b++) {
    const char *line = (const char *)(a->values + (long)a->table[b] * LANES * dim + d * PER_UNIT);
    for (long u = 0; u < LANES / PER_UNIT; u++) {
      U32x16 w[2];
      UNROLL for (int i = 0; i < D; i++) w[i] = load_words(line + u * dim * 4 + i * 64);
      UNROLL for (int r = 0; r < R; r++) {
        U32x16 unit = NAME(broadcast_unit)(weights + r * stride + b * LANES, u);
        UNROLL for (int i = 0; i < D; i++) acc[r][i] = NAME(mac)(acc[r][i], w[i], unit);
      }
    }
  }
  float *weighted = a->weighted + row * dim + d;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int i = 0; i < D; i++) f32_store(weighted + r * dim + i * LANES, acc[r][i]);
}

// As weighted_value_lines, for all dimensions.
INLINE void NAME(weighted_values)(const NAME(HeadAttention) *a, long row, long first, long last,
                                  const int R) {
  long d = 0;
  for (; d + 2 * LANES <= a->dim; d += 2 * LANES) NAME(weighted_value_lines)(a, row, first, last, d, R, 2);
  for (; d < a->dim; d += LANES) NAME(weighted_value_lines)(a, row, first, last, d, R, 1);
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
  case R: NAME(call)(a, r, first, last, R); break;

// Calls call(a, r, first, last, R) for groups of R = 8 queries from query r on, then for the rest as one
// group, since each call reads all keys or values.
#define FOR_QUERY_GROUPS(call)                                         \
  {                                                                    \
    long r = 0;                                                        \
    for (; r + 8 <= queries; r += 8) NAME(call)(a, r, first, last, 8); \
    switch (queries - r) {                                             \
      REMAINDER(call, 7)                                               \
      REMAINDER(call, 6)                                               \
      REMAINDER(call, 5)                                               \
      REMAINDER(call, 4)                                               \
      REMAINDER(call, 3)                                               \
      REMAINDER(call, 2)                                               \
      REMAINDER(call, 1)                                               \
    }                                                                  \
  }

// Computes a->weighted. Keys outside of a query's window or after its position do not count.
static void NAME(attend)(const NAME(HeadAttention) *a) {
  const long queries = a->tokens * a->group, stride = a->stride, dim = a->dim;
  const long position = a->position, window = a->window;
  const long last = (position + a->tokens - 1) / LANES + 1;
  const long first = window && position + 1 > window ? (position + 1 - window) / LANES : 0;
  FOR_QUERY_GROUPS(score_rows)
  for (long r = 0; r < queries; r++) {
    long seen = position + r / a->group + 1, from = window && seen > window ? seen - window : 0;
    float total = NAME(softmax_weights)(a->scores + r * stride, first * LANES, last * LANES, from, seen,
                                        a->weights + r * stride);
    a->scores[r * stride] = total;
  }
  FOR_QUERY_GROUPS(weighted_values)
  for (long r = 0; r < queries; r++)
    for (long d = 0; d < dim; d++) a->weighted[r * dim + d] /= a->scores[r * stride];
}
#undef FOR_QUERY_GROUPS
#undef REMAINDER
