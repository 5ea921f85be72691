// Bounds of the logits of panels by the 8-bit copy of the output layer; see int8_head.h.
//
// The copy is [panels, stride / 4] lines of 64 bytes. A line has the codes of four inputs: two units [16, 2]
// of two inputs, as a unit of bf16 has them. Sums of integers are exact, so their bits depend on no order.

#include "int8_head.h"

#include "sizes.h"
#include "units.h"

#define BLOCK_LINES 128  // lines of products of 8 and 16 bits whose sum fits 32 bits

typedef VecI32 IntegerTile[TILE_ROWS][VEC_LANES == 8 ? 8 : 4];
typedef int8_t VecI8 __attribute__((vector_size(2 * VEC_LANES)));
typedef int16_t VecI16 __attribute__((vector_size(4 * VEC_LANES)));

// codes [2 * VEC_LANES] of two inputs in each column, widened.
INLINE VecI16 load_codes(const int8_t *codes) {
  VecI8 v;
  memcpy(&v, codes, sizeof v);
  return __builtin_convertvector(v, VecI16);
}

// x [2] in every lane.
INLINE VecI16 spread_pair(const int16_t *x) {
  int32_t pair;
  memcpy(&pair, x, sizeof pair);
  return (VecI16)(pair + (VecI32){0});
}

// sum + the products of both inputs of each column.
INLINE VecI32 add_products(VecI32 sum, VecI16 codes, VecI16 x) {
#if defined(__AVX512VNNI__)
  return (VecI32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVX512BW__)
  return sum + (VecI32)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
  return sum + (VecI32)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#elif defined(__SSE2__)
  return sum + (VecI32)_mm_madd_epi16((__m128i)codes, (__m128i)x);
#else
  VecI32 w = (VecI32)codes, v = (VecI32)x;
  return sum + (w << 16 >> 16) * (v << 16 >> 16) + (w >> 16) * (v >> 16);
#endif
}

// codes [P, lines, 64]: P panels. acc[r][v] = x16[r] . codes of vector v of their columns, for R rows from
// `row` on.
INLINE void int8_tile(const int8_t *codes, const Screening *screening, long row, const int R, const int P,
                      Tile acc) {
  const long lines = screening->stride / 4;
  const int16_t *x = screening->x16 + row * screening->stride;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < P * PANEL_VECS; v++) acc[r][v] = (VecF32){0};
  for (long start = 0; start < lines; start += BLOCK_LINES) {
    const long stop = min_long(start + BLOCK_LINES, lines);
    IntegerTile sum;
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < P * PANEL_VECS; v++) sum[r][v] = (VecI32){0};
    for (long line = start; line < stop; line++) {
      UNROLL for (int p = 0; p < P; p++) prefetch(codes + ((P + p) * lines + line) * 64);
      UNROLL for (int unit = 0; unit < 2; unit++) {
        VecI16 widened[VEC_LANES == 8 ? 8 : 4];
        UNROLL for (int p = 0; p < P; p++)
          UNROLL for (int v = 0; v < PANEL_VECS; v++)
            widened[p * PANEL_VECS + v] =
                load_codes(codes + (p * lines + line) * 64 + unit * 32 + v * 2 * VEC_LANES);
        UNROLL for (int r = 0; r < R; r++) {
          VecI16 pair = spread_pair(x + r * screening->stride + 4 * line + 2 * unit);
          UNROLL for (int v = 0; v < P * PANEL_VECS; v++)
            sum[r][v] = add_products(sum[r][v], widened[v], pair);
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int v = 0; v < P * PANEL_VECS; v++)
        acc[r][v] += __builtin_convertvector(sum[r][v], VecF32);
  }
}

// Writes the bounds of R rows from `row` on at P panels from `panel` on; columns beyond `out` do not count.
INLINE void screen_tile(const Int8Head *head, long out, const Screening *screening, long row, long panel,
                        const int R, const int P) {
  Tile acc;
  int8_tile(head->panels + panel * screening->stride * PANEL, screening, row, R, P, acc);
  UNROLL for (int p = 0; p < P; p++) {
    const long column = (panel + p) * PANEL;
    UNROLL for (int r = 0; r < R; r++) {
      const ScreenedRow bound = screening->row[row + r];
      VecF32 upper, lower;
      UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        VecF32 product = acc[r][p * PANEL_VECS + v] * bound.step;
        VecF32 scale = f32_load(head->scales + column + v * VEC_LANES);
        VecF32 error = f32_load(head->errors + column + v * VEC_LANES) * bound.rest + bound.slack;
        VecF32 high = scale * (product + bound.outliers) + error;
        VecF32 low = scale * (product - bound.outliers) - error;
        if (column + PANEL > out) {
          VecI32 real = lane_numbers() + (int32_t)(column + v * VEC_LANES) < (int32_t)out;
          high = select_lanes(real, high, splat(-INFINITY));
          low = select_lanes(real, low, splat(-INFINITY));
        }
        upper = v ? max_vectors(upper, high) : high;
        lower = v ? max_vectors(lower, low) : low;
      }
      const long at = (row + r) * screening->panels + panel + p;
      screening->upper[at] = max_lanes(upper);
      screening->lower[at] = max_lanes(lower);
    }
  }
}

// screen_tile for R rows and panels [from, to).
#define SCREEN_TILES(R, from, to)                                                \
  for (long panel = from; panel < to;) {                                         \
    if (panel + TILE_PANELS(R) <= to) {                                          \
      screen_tile(head, out, screening, row, panel, R, TILE_PANELS(R));          \
      panel += TILE_PANELS(R);                                                   \
    } else {                                                                     \
      screen_tile(head, out, screening, row, panel, R, 1);                       \
      panel++;                                                                   \
    }                                                                            \
  }

#define REMAINDER(R) \
  case R: SCREEN_TILES(R, first, last) break;

// Writes the bounds of all rows and panels [first, last). A few panels are multiplied by all whole tiles of
// rows while they are cached.
void screen_panels(const Int8Head *head, long out, const Screening *screening, long first, long last) {
  const long whole = screening->rows / TILE_ROWS * TILE_ROWS;
  long row = 0;
  for (long from = first, to; from < last; from = to) {
    to = min_long(from + TILE_PANELS(TILE_ROWS), last);
    for (row = 0; row < whole; row += TILE_ROWS) SCREEN_TILES(TILE_ROWS, from, to)
  }
  row = whole;
  switch (screening->rows - whole) {
#if TILE_ROWS > 4
    REMAINDER(7)
    REMAINDER(6)
    REMAINDER(5)
    REMAINDER(4)
#endif
#if TILE_ROWS > 2
    REMAINDER(3)
    REMAINDER(2)
#endif
    REMAINDER(1)
  }
}
#undef REMAINDER
#undef SCREEN_TILES
