// Included once for each element type: causal attention over paged keys and values.
//
// A block holds LANES tokens of one head. Keys lie as [dim / PER_UNIT, 16, PER_UNIT], so that one
// line has a unit of each token and a row of scores needs no sum over lanes; values as
// [16 / PER_UNIT, dim, PER_UNIT], so that a line has a unit of neighbouring tokens for each of 16
// dimensions. Both are the panels of linear.h: scores = q K', mixed = weights V.
//
// A query's operations do not depend on which queries are computed beside it: keys it cannot see
// get weight zero, and values are finite.


INLINE void NAME(put_key)(ELEMENT *block, long token, const float *key, long dim) {
  for (long d = 0; d < dim; d++)
    block[(d / PER_UNIT * LANES + token) * PER_UNIT + d % PER_UNIT] = NAME(narrow)(key[d]);
}

// NaN becomes 0 and infinities the largest finite value: a weight of zero times either would carry
// one tenant's overflow into the next owner of the block.
INLINE void NAME(put_value)(ELEMENT *block, long token, const float *value, long dim) {
  for (long d = 0; d < dim; d++) {
    float v = value[d];
    v = v != v ? 0.0f : v > LARGEST ? LARGEST : v < -LARGEST ? -LARGEST : v;
    block[(token / PER_UNIT * dim + d) * PER_UNIT + token % PER_UNIT] = NAME(narrow)(v);
  }
}

// scores[r][16 b ..] for R queries and B blocks from `b` on. q [R, dim]. Asks for the blocks of keys behind
// them and for their values, which no processor could guess.
INLINE void NAME(score_blocks)(const ELEMENT *q, long dim, const ELEMENT *keys, const ELEMENT *values,
                               const int32_t *table, long b, long last, float scale, const int R,
                               const int B, float *scores, long stride) {
  long units = dim / PER_UNIT, size = LANES * dim;
  const char *line[2], *next[2], *value[2];
  UNROLL for (int i = 0; i < B; i++) {
    line[i] = (const char *)(keys + table[b + i] * size);
    next[i] = (const char *)(keys + table[at_most(b + B + i, last - 1)] * size);
    value[i] = (const char *)(values + table[b + i] * size);
  }
  vec acc[8][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < B; i++) acc[r][i] = (vec){0};
  for (long u = 0; u < units; u++) {
    words w[2];
    UNROLL for (int i = 0; i < B; i++) {
      w[i] = load_words(line[i] + u * 64);
      expect(next[i] + u * 64);
      expect(value[i] + u * 64);
    }
    UNROLL for (int r = 0; r < R; r++) {
      words unit = NAME(unit)(q + r * dim, u);
      UNROLL for (int i = 0; i < B; i++) acc[r][i] = NAME(mac)(acc[r][i], w[i], unit);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < B; i++)
    f32_store(scores + r * stride + (b + i) * LANES, acc[r][i] * scale);
}

// The same for the blocks [first, last): two at a time for many queries, which wait for arithmetic; few
// wait for memory, which gives them one after the other sooner.
INLINE void NAME(score_rows)(const ELEMENT *q, long dim, const ELEMENT *keys, const ELEMENT *values,
                             const int32_t *table, long first, long last, float scale, const int R,
                             float *scores, long stride) {
  long b = first;
  for (; R == 8 && b + 2 <= last; b += 2)
    NAME(score_blocks)(q, dim, keys, values, table, b, last, scale, R, 2, scores, stride);
  for (; b < last; b++)
    NAME(score_blocks)(q, dim, keys, values, table, b, last, scale, R, 1, scores, stride);
}

// mixed[r][d ..] = sum of weights[r][t] * values[t] for R queries and D lines of dimensions from `d` on.
INLINE void NAME(mix_lines)(const ELEMENT *weights, long stride, const ELEMENT *values, long dim,
                            const int32_t *table, long first, long last, long d, const int R,
                            const int D, float *mixed) {
  vec acc[8][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < D; i++) acc[r][i] = (vec){0};
  for (long b = first; b < last; b++) {
    const char *line = (const char *)(values + (long)table[b] * LANES * dim + d * PER_UNIT);
    for (long u = 0; u < LANES / PER_UNIT; u++) {
      words w[2];
      UNROLL for (int i = 0; i < D; i++) w[i] = load_words(line + u * dim * 4 + i * 64);
      UNROLL for (int r = 0; r < R; r++) {
        words unit = NAME(unit)(weights + r * stride + b * LANES, u);
        UNROLL for (int i = 0; i < D; i++) acc[r][i] = NAME(mac)(acc[r][i], w[i], unit);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < D; i++)
    f32_store(mixed + r * dim + d + i * LANES, acc[r][i]);
}

// mixed[r] = sum of weights[r][t] * values[t]; weights [R, stride], mixed [R, dim].
INLINE void NAME(mix_rows)(const ELEMENT *weights, long stride, const ELEMENT *values, long dim,
                           const int32_t *table, long first, long last, const int R, float *mixed) {
  long d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES)
    NAME(mix_lines)(weights, stride, values, dim, table, first, last, d, R, 2, mixed);
  for (; d < dim; d += LANES)
    NAME(mix_lines)(weights, stride, values, dim, table, first, last, d, R, 1, mixed);
}

// Turns the scores of keys [first, end) into weights; only keys [from, seen) are visible, the others
// get zero. Returns what the mix is to be divided by.
static float NAME(weigh)(float *scores, long first, long end, long from, long seen, ELEMENT *weights) {
  const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vec peaks = splat(-INFINITY), sums = {0};
  for (long t = first; t < end; t += LANES) {
    vec s = f32_load(scores + t);
    if (t < from || t + LANES > seen) {
      ints at = lane + (int32_t)t, visible = (at >= (int32_t)from) & (at < (int32_t)seen);
      s = select_lanes(visible, s, splat(-INFINITY));
      f32_store(scores + t, s);
    }
    peaks = select_lanes(s > peaks, s, peaks);
  }
  vec peak = splat(max_lanes(peaks));
  for (long t = first; t < end; t += LANES) {
    vec e = exp_lanes(f32_load(scores + t) - peak);
    sums += e;
    NAME(store)(weights + t, e);
  }
  return sum_lanes(sums);
}

#define REST(call, R) \
  case R:             \
    call(R);          \
    break;

// Eight queries at a time, then those that are left, since each pass reads keys or values anew.
#define GROUPS(call)                          \
  {                                           \
    long r = 0;                               \
    for (; r + 8 <= queries; r += 8) call(8); \
    switch (queries - r) {                    \
      REST(call, 7)                           \
      REST(call, 6)                           \
      REST(call, 5)                           \
      REST(call, 4)                           \
      REST(call, 3)                           \
      REST(call, 2)                           \
      REST(call, 1)                           \
    }                                         \
  }
#define SCORE(R) \
  NAME(score_rows)(q + r * dim, dim, keys, values, table, first, last, scale, R, scores + r * stride, \
                   stride)
#define MIX(R) \
  NAME(mix_rows)(weights + r * stride, stride, values, dim, table, first, last, R, mixed + r * dim)

// Queries of one head of keys: `tokens` neighbours from position `at` on, `group` heads of each, in q
// [tokens * group, dim]. Leaves the answer in mixed [tokens * group, dim]. Scratch: scores and weights
// [tokens * group, stride], stride a multiple of LANES that holds every key.
static void NAME(attend)(const ELEMENT *q, long tokens, long group, long dim, const ELEMENT *keys,
                         const ELEMENT *values, const int32_t *table, long at, long window,
                         float scale, float *scores, ELEMENT *weights, long stride, float *mixed) {
  long queries = tokens * group, last = (at + tokens - 1) / LANES + 1;
  long first = window && at + 1 > window ? (at + 1 - window) / LANES : 0;
  GROUPS(SCORE)
  for (long r = 0; r < queries; r++) {
    long seen = at + r / group + 1, from = window && seen > window ? seen - window : 0;
    float total = NAME(weigh)(scores + r * stride, first * LANES, last * LANES, from, seen,
                              weights + r * stride);
    scores[r * stride] = total;
  }
  GROUPS(MIX)
  for (long r = 0; r < queries; r++)
    for (long d = 0; d < dim; d++) mixed[r * dim + d] /= scores[r * stride];
}
#undef GROUPS
#undef REST
#undef SCORE
#undef MIX
