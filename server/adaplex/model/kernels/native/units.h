// Multiplication of weights by activations, by the types of both.
//
// single: fp32 weights times fp32 activations. pair: bf16 weights times fp32 activations. native: bf16
// weights times bf16 activations, by AVX512-BF16.
//
// A unit is four bytes of weights for each column of a vector: one input in fp32, or two neighbouring inputs
// in bf16, the first in the low half. A line is a register of weights along the inputs of one column.

#pragma once

#include "vectors.h"

// The sums of a tile: [rows][vectors of columns].
typedef VecF32 Tile[TILE_ROWS][VEC_LANES == 8 ? 8 : 4];

typedef VecF32 single_Unit;
typedef VecF32 single_Line;
enum { single_LINE = VEC_LANES };

INLINE single_Unit single_unit(VecU32 w) { return (VecF32)w; }

// x [1].
INLINE single_Unit single_spread(const float *x) { return splat(x[0]); }

INLINE VecF32 single_mac(VecF32 acc, single_Unit w, single_Unit x) { return acc + w * x; }

// p [left] -> the first single_LINE of them, zero beyond.
INLINE single_Line single_weights(const float *p, long left) { return f32_load_partial(p, left); }

// p [left], as single_weights.
INLINE single_Line single_inputs(const float *p, long left) { return f32_load_partial(p, left); }

INLINE VecF32 single_dot(VecF32 acc, single_Line w, single_Line x) { return acc + w * x; }

typedef struct {
  VecF32 first, second;
} pair_Unit;
typedef VecF32 pair_Line;
enum { pair_LINE = VEC_LANES };

INLINE pair_Unit pair_unit(VecU32 w) {
  return (pair_Unit){(VecF32)(w << 16), (VecF32)(w & 0xffff0000u)};
}

// x [2].
INLINE pair_Unit pair_spread(const float *x) { return (pair_Unit){splat(x[0]), splat(x[1])}; }

INLINE VecF32 pair_mac(VecF32 acc, pair_Unit w, pair_Unit x) {
  acc += w.first * x.first;
  return acc + w.second * x.second;
}

// p [left] -> the first pair_LINE of them, zero beyond.
INLINE pair_Line pair_weights(const uint16_t *p, long left) { return bf16_load_partial(p, left); }

// p [left], as pair_weights.
INLINE pair_Line pair_inputs(const float *p, long left) { return f32_load_partial(p, left); }

INLINE VecF32 pair_dot(VecF32 acc, pair_Line w, pair_Line x) { return acc + w * x; }

#ifdef NATIVE_BF16
typedef VecU32 native_Unit;
typedef VecU32 native_Line;
enum { native_LINE = 2 * VEC_LANES };

INLINE native_Unit native_unit(VecU32 w) { return w; }

// x [2].
INLINE native_Unit native_spread(const uint16_t *x) {
  uint32_t w;
  memcpy(&w, x, sizeof w);
  return w + (VecU32){0};
}

INLINE VecF32 native_mac(VecF32 acc, native_Unit w, native_Unit x) {
  return (VecF32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}

// p [left] -> the first native_LINE of them, zero beyond.
INLINE native_Line native_weights(const uint16_t *p, long left) { return load_partial(p, 2 * left); }

// p [left], as native_weights.
INLINE native_Line native_inputs(const uint16_t *p, long left) { return load_partial(p, 2 * left); }

INLINE VecF32 native_dot(VecF32 acc, native_Line w, native_Line x) { return native_mac(acc, w, x); }
#endif

// x [R, n], rows x_stride apart -> to [R]: minus the sum of each row.
INLINE void pair_minus_sums(const float *x, long x_stride, long n, const int R, float *to) {
  VecF32 sum[TILE_ROWS];
  UNROLL for (int r = 0; r < R; r++) sum[r] = (VecF32){0};
  for (long i = 0; i < n; i += VEC_LANES)
    UNROLL for (int r = 0; r < R; r++) sum[r] -= f32_load_partial(x + r * x_stride + i, n - i);
  lane_sums(sum, R, to);
}

#ifdef NATIVE_BF16
// As pair_minus_sums: x [R, n], to [R].
INLINE void native_minus_sums(const uint16_t *x, long x_stride, long n, const int R, float *to) {
  const VecU32 minus_ones = (VecU32){0} + 0xbf80bf80u;
  VecF32 sum[TILE_ROWS];
  UNROLL for (int r = 0; r < R; r++) sum[r] = (VecF32){0};
  for (long i = 0; i < n; i += native_LINE)
    UNROLL for (int r = 0; r < R; r++)
      sum[r] = native_mac(sum[r], minus_ones, native_inputs(x + r * x_stride + i, n - i));
  lane_sums(sum, R, to);
}
#endif

// words [V]: one unit of V vectors of columns; x: the activations of row 0 at the unit, rows x_stride apart.
// acc[r][first + v] += words[v] * (x of row r), for R rows.
#define DEFINE_MAC_ROWS(kind, Activation)                                                  \
  INLINE void kind##_mac_rows(Tile acc, const int first, const VecU32 *words, const int V, \
                              const Activation *x, long x_stride, const int R) {           \
    kind##_Unit unit[4];                                                                   \
    UNROLL for (int v = 0; v < V; v++) unit[v] = kind##_unit(words[v]);                    \
    UNROLL for (int r = 0; r < R; r++) {                                                   \
      kind##_Unit spread = kind##_spread(x + r * x_stride);                                \
      UNROLL for (int v = 0; v < V; v++)                                                   \
        acc[r][first + v] = kind##_mac(acc[r][first + v], unit[v], spread);                \
    }                                                                                      \
  }

DEFINE_MAC_ROWS(single, float)
DEFINE_MAC_ROWS(pair, float)
#ifdef NATIVE_BF16
DEFINE_MAC_ROWS(native, uint16_t)
#endif
#undef DEFINE_MAC_ROWS
