// Included once for each element type: products by a weight kept in 4 bits, in groups of inputs.
//
// W[n, i] = scale * (code - zero), codes of -8 .. 7, one scale and one zero for a column and a group of
// inputs. Panels have nf4's layout (see linear.h), with code + 8 in a nibble. Scales lie in
// [panels, in / group, 16] pairs of bf16, the scale first; zeros of a weight's own in
// [panels, in / group, 16] fp32. Codes are exact in bf16, and a group's zero is taken off once:
// its columns add scale * (sum of code * x - zero * sum of x).

// Codes of unit `k` of a line of eight inputs, as elements.
INLINE words NAME(int4_decode)(words packed, const int k) {
#if PER_UNIT == 2
  return look_up(&INT4, (halves)packed, k);
#else
  ints nibble = (ints)((packed >> (uint32_t)(16 * (k % 2) + 4 * (k / 2))) & 15);
  return (words)(__builtin_convertvector(nibble, vec) - 8.0f);
#endif
}

// Minus the sum of a group of inputs of R rows, that of row r in lane 2 r.
INLINE vec NAME(minus_sums)(const ELEMENT *x, long x_stride, long group, const int R) {
  const words minus_ones = (words){0} + (PER_UNIT == 2 ? 0xbf80bf80u : 0xbf800000u);
  const long step = LANES * PER_UNIT;
  vec sum[8];
  UNROLL for (int r = 0; r < R; r++) sum[r] = (vec){0};
  for (long i = 0; i < group; i += step) UNROLL for (int r = 0; r < R; r++) {
    const ELEMENT *from = x + r * x_stride + i;
    words line = group < step ? (words)NAME(load)(from) : load_words(from);
    sum[r] = NAME(mac)(sum[r], minus_ones, line);
  }
  return sums_of_lanes(sum, R);
}

// R rows times P neighbouring panels, from `panel` on; `own_zeros` stands in for those in `scales`.
INLINE void NAME(int4_tile)(const ELEMENT *x, long x_stride, const Weight *weight, const float *own_zeros,
                            long panel, const Asks *asks, Turn turn, const int R, const int P,
                            vec acc[8][4]) {
  const long groups = weight->in / weight->group, lines = weight->group / 8;
  const char *codes = (const char *)weight->panels + panel * groups * lines * 64;
  const char *next = share_of(codes + P * groups * lines * 64, groups * lines, turn);
  const long pace = pace_of(turn);
  const char *pairs = (const char *)weight->scales + panel * groups * 64;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long group = 0; group < groups; group++) {
    vec part[8][4];
    float minus_sum[LANES];
    f32_store(minus_sum, NAME(minus_sums)(x + group * weight->group, x_stride, weight->group, R));
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) part[r][p] = (vec){0};
    for (long line = lines * group; line < lines * (group + 1); line++) {
      words packed[4];
      if (asks) ask(asks, line);
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = load_words(codes + (p * groups * lines + line) * 64);
        expect(next + p * groups * lines * 64 + line * pace);
      }
      UNROLL for (int k = 0; k < 8 / PER_UNIT; k++) {
        words w[4];
        UNROLL for (int p = 0; p < P; p++) w[p] = NAME(int4_decode)(packed[p], k);
        UNROLL for (int r = 0; r < R; r++) {
          words unit = NAME(unit)(x + r * x_stride, 8 / PER_UNIT * line + k);
          UNROLL for (int p = 0; p < P; p++) part[r][p] = NAME(mac)(part[r][p], w[p], unit);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      expect(pairs + ((p + P) * groups + group) * 64);
      words pair = load_words(pairs + (p * groups + group) * 64);
      vec scale = (vec)(pair << 16), zero = (vec)(pair & 0xffff0000u);
      if (own_zeros) zero = f32_load(own_zeros + ((panel + p) * groups + group) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += (part[r][p] + zero * minus_sum[2 * r]) * scale;
    }
  }
}
