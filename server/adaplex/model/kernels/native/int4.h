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

// The sum of a group of inputs, in every lane; `count` is a multiple of LANES.
INLINE vec NAME(group_sum)(const ELEMENT *x, long count) {
  vec total = NAME(load)(x);
  for (long i = LANES; i < count; i += LANES) total += NAME(load)(x + i);
  return splat(sum_lanes(total));
}

// R rows times P neighbouring panels, from `panel` on; `own_zeros` stands in for those in `scales`.
INLINE void NAME(int4_tile)(const ELEMENT *x, long x_stride, const Weight *weight, const float *own_zeros,
                            long panel, const Asks *asks, const int R, const int P, vec acc[8][4]) {
  const long groups = weight->in / weight->group, lines = weight->group / 8;
  const char *codes = (const char *)weight->panels + panel * groups * lines * 64;
  const char *pairs = (const char *)weight->scales + panel * groups * 64;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = (vec){0};
  for (long group = 0; group < groups; group++) {
    vec part[8][4], sum[8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) part[r][p] = (vec){0};
    for (long line = lines * group; line < lines * (group + 1); line++) {
      words packed[4];
      if (asks) ask(asks, line);
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = load_words(codes + (p * groups * lines + line) * 64);
        expect(codes + ((p + P) * groups * lines + line) * 64);
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
    UNROLL for (int r = 0; r < R; r++)
      sum[r] = NAME(group_sum)(x + r * x_stride + group * weight->group, weight->group);
    UNROLL for (int p = 0; p < P; p++) {
      words pair = load_words(pairs + (p * groups + group) * 64);
      vec scale = (vec)(pair << 16), zero = (vec)(pair & 0xffff0000u);
      if (own_zeros) zero = f32_load(own_zeros + ((panel + p) * groups + group) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += (part[r][p] - zero * sum[r]) * scale;
    }
  }
}
