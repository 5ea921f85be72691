// Included once for each element type: tiles of y = x W' for a frozen W [out, in].
//
// W is stored in panels of 16 output columns. Dense: [panels, in / PER_UNIT, 16] units of four bytes. Codes:
// [panels, in / 8] lines as in code_values.h, with a scale for each column and group of inputs. nf4: groups
// of 64 inputs, scales fp32 [panels, in / 64, 16]. int4: scales [panels, in / group, 16] are pairs of bf16,
// scale and zero; separate zeros are [panels, in / group, 16] fp32. Codes are exact in bf16, and a group's
// zero is subtracted once: y += scale * (sum of code * x - zero * sum of x).
//
// Each output is one chain of operations, whose order does not depend on the number of rows.

// Panels whose weights are in registers at once: all of a tile if a panel is one register, else one.
#define PANELS_AT_ONCE(P) (PANEL_VECS == 1 ? (P) : 1)

// panel: dense panels [P, units, 16]. acc[r] = x[r] W[columns of all panels]'.
INLINE void NAME(dense_tile)(NAME(TileRows) rows, const char *panel, long units, const int R, const int P,
                             Tile acc) {
  const int at_once = PANELS_AT_ONCE(P);
  const char *next = share_start(panel + P * units * 64, units, rows.block);
  const long next_stride = share_stride(rows.block);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++) acc[r][v] = (VecF32){0};
  for (long u = 0; u < units; u++) {
    if (rows.plan && u % (8 / PER_UNIT) == 0) prefetch_share(rows.plan, u / (8 / PER_UNIT));
    UNROLL for (int first = 0; first < P; first += at_once) {
      VecU32 words[4];
      UNROLL for (int p = 0; p < at_once; p++) {
        const char *unit = panel + ((first + p) * units + u) * 64;
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
          words[p * PANEL_VECS + v] = load_words(unit + v * 4 * VEC_LANES);
        prefetch(next + (first + p) * units * 64 + u * next_stride);
      }
      UNIT(mac_rows)(acc, first * PANEL_VECS, words, at_once * PANEL_VECS, rows.x + u * PER_UNIT,
                     rows.x_stride, R);
    }
  }
}

// own_zeros [panels, in / group, 16] replaces the zeros of the weight unless it is null; `nf4` chooses the
// format. acc[r][column + v] = x[r] W[vector v of the columns of all P panels from `panel` on]'.
INLINE void NAME(code_tile)(NAME(TileRows) rows, const Weight *weight, const int nf4, const float *own_zeros,
                            long panel, const int R, const int P, Tile acc, const int column) {
  const int at_once = PANELS_AT_ONCE(P);
  const CodeValues *values = nf4 ? &NF4 : &INT4;
  const long group = nf4 ? NF4_GROUP : weight->group;
  const long groups = weight->in_features / group, lines = group / 8;
  const char *codes = (const char *)weight->panels + panel * groups * lines * 64;
  const char *next = share_start(codes + P * groups * lines * 64, groups * lines, rows.block);
  const long next_stride = share_stride(rows.block);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++) acc[r][column + v] = (VecF32){0};
  for (long g = 0; g < groups; g++) {
    Tile sum;
    float minus_sum[TILE_ROWS];
    if (!nf4) CODE(minus_sums)(rows.x + g * group, rows.x_stride, group, R, minus_sum);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < P * PANEL_VECS; v++) sum[r][v] = (VecF32){0};
    for (long line = lines * g; line < lines * (g + 1); line++) {
      if (rows.plan) prefetch_share(rows.plan, line);
      UNROLL for (int p = 0; p < P; p++) prefetch(next + p * groups * lines * 64 + line * next_stride);
      UNROLL for (int j = 0; j < 4; j++)
        UNROLL for (int first = 0; first < P; first += at_once) {
          VecU32 words[4];
          UNROLL for (int p = 0; p < at_once; p++) {
            const char *from = codes + ((first + p) * groups * lines + line) * 64;
            decode_unit(values, from, j, words + p * PANEL_VECS);
          }
          CODE(mac_rows)(sum, first * PANEL_VECS, words, at_once * PANEL_VECS, rows.x + 8 * line + 2 * j,
                         rows.x_stride, R);
        }
    }
    UNROLL for (int p = 0; p < P; p++)
      UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        const GroupScale scale = group_scale(weight, nf4, own_zeros, (panel + p) * groups + g, v);
        if (v == 0) prefetch((const float *)weight->scales + ((panel + p + P) * groups + g) * PANEL);
        const int from = p * PANEL_VECS + v, to = column + from;
        UNROLL for (int r = 0; r < R; r++)
          acc[r][to] = add_group(acc[r][to], sum[r][from], scale, nf4, nf4 ? 0 : minus_sum[r]);
      }
  }
}
