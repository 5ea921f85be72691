// Included once for each element type: products by a weight of 4-bit codes in groups of inputs.
//
// W[n, i] = scale * (code - zero), codes -8 to 7, with one scale and one zero for each column and group of
// inputs. Panels have the layout of nf4 (see linear.h), with code + 8 in a nibble. Scales and zeros are
// [panels, in / group, 16] pairs of bf16, the scale first; separate zeros are [panels, in / group, 16] fp32.
// Codes are exact in bf16, and a group's zero is subtracted once:
// y += scale * (sum of code * x - zero * sum of x).

// packed: a line of eight inputs of 16 columns -> the codes of unit k of the line, as elements.
INLINE U32x16 NAME(int4_decode)(U32x16 packed, const int k) {
#if PER_UNIT == 2
  return look_up(&INT4, (U16x32)packed, k);
#else
  I32x16 nibble = (I32x16)((packed >> (uint32_t)(16 * (k % 2) + 4 * (k / 2))) & 15);
  return (U32x16)(__builtin_convertvector(nibble, F32x16) - 8.0f);
#endif
}

// x [R, group], rows x_stride apart -> minus the sum of row r in lane 2 r.
INLINE F32x16 NAME(minus_sums)(const ELEMENT *x, long x_stride, long group, const int R) {
  const U32x16 minus_ones = (U32x16){0} + (PER_UNIT == 2 ? 0xbf80bf80u : 0xbf800000u);
  const long step = LANES * PER_UNIT;
  F32x16 sum[8];
  UNROLL for (int r = 0; r < R; r++) sum[r] = (F32x16){0};
  for (long i = 0; i < group; i += step)
    UNROLL for (int r = 0; r < R; r++) {
      const ELEMENT *from = x + r * x_stride + i;
      U32x16 line = group < step ? (U32x16)NAME(load)(from) : load_words(from);
      sum[r] = NAME(mac)(sum[r], minus_ones, line);
    }
  return lane_sums(sum, R);
}

// own_zeros [panels, in / group, 16] replaces the zeros of the weight unless it is null; acc [R, P] vectors
// of 16 columns. acc[r][p] = x[r] W[columns of panel + p]'.
INLINE void NAME(int4_tile)(NAME(TileRows) rows, const Weight *weight, const float *own_zeros, long panel,
                            const int R, const int P, F32x16 acc[8][4]) {
  const long groups = weight->in_features / weight->group, lines = weight->group / 8;
  const char *codes = (const char *)weight->panels + panel * groups * lines * 64;
  const char *next = share_start(codes + P * groups * lines * 64, groups * lines, rows.block);
  const long next_stride = share_stride(rows.block);
  const char *pairs = (const char *)weight->scales + panel * groups * 64;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int p = 0; p < P; p++) acc[r][p] = (F32x16){0};
  for (long group = 0; group < groups; group++) {
    F32x16 group_sum[8][4];
    float minus_sum[LANES];
    f32_store(minus_sum, NAME(minus_sums)(rows.x + group * weight->group, rows.x_stride, weight->group, R));
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++) group_sum[r][p] = (F32x16){0};
    for (long line = lines * group; line < lines * (group + 1); line++) {
      U32x16 packed[4];
      if (rows.plan) prefetch_share(rows.plan, line);
      UNROLL for (int p = 0; p < P; p++) {
        packed[p] = load_words(codes + (p * groups * lines + line) * 64);
        prefetch(next + p * groups * lines * 64 + line * next_stride);
      }
      UNROLL for (int k = 0; k < 8 / PER_UNIT; k++) {
        U32x16 w[4];
        UNROLL for (int p = 0; p < P; p++) w[p] = NAME(int4_decode)(packed[p], k);
        UNROLL for (int r = 0; r < R; r++) {
          U32x16 unit = NAME(broadcast_unit)(rows.x + r * rows.x_stride, 8 / PER_UNIT * line + k);
          UNROLL for (int p = 0; p < P; p++) group_sum[r][p] = NAME(mac)(group_sum[r][p], w[p], unit);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      prefetch(pairs + ((p + P) * groups + group) * 64);
      U32x16 pair = load_words(pairs + (p * groups + group) * 64);
      F32x16 scale = (F32x16)(pair << 16), zero = (F32x16)(pair & 0xffff0000u);
      if (own_zeros) zero = f32_load(own_zeros + ((panel + p) * groups + group) * LANES);
      UNROLL for (int r = 0; r < R; r++) acc[r][p] += (group_sum[r][p] + zero * minus_sum[2 * r]) * scale;
    }
  }
}
