// Vectors of 16 fp32 lanes (64 bytes), and loads and stores of the two element types, fp32 and bf16.
//
// GCC compiles its vector types to AVX-512, AVX2 or scalar instructions, as the library's flags allow.
// Intrinsics are used only for AVX512-BF16, and for AVX512-BW and AVX2 shuffles in code_values.h.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define NATIVE_BF16 1
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float F32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x32 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

// x in every lane.
INLINE F32x16 splat(float x) { return x - (F32x16){0}; }

// p [16] words of four bytes.
INLINE U32x16 load_words(const void *p) {
  U32x16 w;
  memcpy(&w, p, sizeof w);
  return w;
}

// p [bytes], at most 64 -> words; the bytes after them are zero.
INLINE U32x16 load_partial(const void *p, long bytes) {
  U32x16 w = {0};
  memcpy(&w, p, (size_t)bytes);
  return w;
}

// Prefetches the cache line at p into all cache levels. Products prefetch the panel after the current
// one, since a panel is too short for the hardware prefetcher. p may lie beyond the end of an array.
INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

// Prefetches the cache line at p into the second-level cache, for data that is read later.
INLINE void prefetch_later(const void *p) { __builtin_prefetch(p, 0, 2); }

// The sum of 16 lanes, by a fixed tree of additions, so that its bits do not depend on the caller.
INLINE float sum_lanes(F32x16 v) {
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = v[i] + v[i + 8];
  float quarter[4];
  for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Lanes 0-7: first half of a plus its second half; lanes 8-15: the same of b. add_quarters and add_pairs
// do the same within each half and each quarter.
INLINE F32x16 add_halves(F32x16 a, F32x16 b) {
  return __builtin_shuffle(a, b, (I32x16){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
         __builtin_shuffle(a, b, (I32x16){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}

INLINE F32x16 add_quarters(F32x16 a, F32x16 b) {
  return __builtin_shuffle(a, b, (I32x16){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, (I32x16){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

INLINE F32x16 add_pairs(F32x16 a, F32x16 b) {
  return __builtin_shuffle(a, b, (I32x16){0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
         __builtin_shuffle(a, b, (I32x16){2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
}

// v [R] vectors, R at most 8 -> sum_lanes(v[r]) in lane 2 r, with the same bits.
INLINE F32x16 lane_sums(const F32x16 *v, const int R) {
  F32x16 half[4], quarter[2];
#define AT(i) ((i) < R ? (i) : R - 1)
  UNROLL for (int i = 0; i < 4; i++) half[i] = add_halves(v[AT(2 * i)], v[AT(2 * i + 1)]);
#undef AT
  UNROLL for (int i = 0; i < 2; i++) quarter[i] = add_quarters(half[2 * i], half[2 * i + 1]);
  F32x16 pair = add_pairs(quarter[0], quarter[1]);
  return pair + __builtin_shuffle(pair, (I32x16){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

// The largest of 16 lanes, none of which is NaN.
INLINE float max_lanes(F32x16 v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// `yes` in lanes where the mask is -1, `no` where it is 0.
INLINE F32x16 select_lanes(I32x16 mask, F32x16 yes, F32x16 no) {
  return (F32x16)(((I32x16)yes & mask) | ((I32x16)no & ~mask));
}

// exp(x) of each lane within 2 ulp; 0 below -87, exp(88) above 88, NaN for NaN. Cody and Waite's
// reduction, then Cephes' polynomial.
INLINE F32x16 exp_lanes(F32x16 x) {
  I32x16 under = x<splat(-87.0f), over = x> splat(88.0f), nan = x != x;
  F32x16 safe = select_lanes(under | nan, splat(-87.0f), select_lanes(over, splat(88.0f), x));
  F32x16 shifted = safe * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  F32x16 n = shifted - 12582912.0f;
  F32x16 r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
  F32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I32x16 exponent = __builtin_convertvector(n, I32x16);
  F32x16 scaled = (F32x16)((I32x16)p + (exponent << 23));
  return select_lanes(nan, x, select_lanes(under, (F32x16){0}, scaled));
}

// fp32. A unit is four bytes: one element.

INLINE float f32_widen(float x) { return x; }
INLINE float f32_narrow(float x) { return x; }

// p [16].
INLINE F32x16 f32_load(const float *p) {
  F32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

// p [16] = v.
INLINE void f32_store(float *p, F32x16 v) { memcpy(p, &v, sizeof v); }

// p [left] -> the first 16 of them, zero in lanes beyond `left`, which may be negative.
INLINE F32x16 f32_load_partial(const float *p, long left) {
  if (left >= LANES) return f32_load(p);
  return left > 0 ? (F32x16)load_partial(p, left * (long)sizeof(float)) : (F32x16){0};
}

// p [left] = the first `left` lanes of v, all if `left` is more than 16, none if it is negative.
INLINE void f32_store_partial(float *p, F32x16 v, long left) {
  if (left >= LANES)
    f32_store(p, v);
  else if (left > 0)
    memcpy(p, &v, (size_t)left * sizeof(float));
}

// row [units] -> unit u in every lane.
INLINE U32x16 f32_broadcast_unit(const float *row, long u) {
  uint32_t w;
  memcpy(&w, row + u, sizeof w);
  return w + (U32x16){0};
}

// acc + w * x, lane by lane.
INLINE F32x16 f32_mac(F32x16 acc, U32x16 w, U32x16 x) { return acc + (F32x16)w * (F32x16)x; }

// bf16. A unit is four bytes: two neighbouring elements, the first one in the low half.

INLINE float bf16_widen(uint16_t x) {
  uint32_t w = (uint32_t)x << 16;
  float f;
  memcpy(&f, &w, sizeof f);
  return f;
}

// Rounds to nearest, ties to even; NaN gives NaN.
INLINE uint16_t bf16_narrow(float x) {
  uint32_t w;
  memcpy(&w, &x, sizeof w);
  if (x != x) return (uint16_t)((w >> 16) | 0x40);
  return (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

// p [16], widened to fp32.
INLINE F32x16 bf16_load(const uint16_t *p) {
  U16x16 h;
  memcpy(&h, p, sizeof h);
  return (F32x16)(__builtin_convertvector(h, U32x16) << 16);
}

// p [left], as f32_load_partial.
INLINE F32x16 bf16_load_partial(const uint16_t *p, long left) {
  U16x16 h = {0};
  if (left >= LANES) return bf16_load(p);
  if (left > 0) memcpy(&h, p, (size_t)left * sizeof(uint16_t));
  return (F32x16)(__builtin_convertvector(h, U32x16) << 16);
}

// p [16] = v, rounded to nearest, ties to even; NaN gives NaN.
INLINE void bf16_store(uint16_t *p, F32x16 v) {
#ifdef NATIVE_BF16
  U16x16 h = (U16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  U32x16 w = (U32x16)v;
  U32x16 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  U32x16 nan = (U32x16)(v != v);
  U32x16 kept = (rounded & ~nan) | (((w >> 16) | 0x40) & nan);
  U16x16 h = __builtin_convertvector(kept, U16x16);
#endif
  memcpy(p, &h, sizeof h);
}

// p [left] = v, as f32_store_partial.
INLINE void bf16_store_partial(uint16_t *p, F32x16 v, long left) {
  uint16_t line[LANES];
  bf16_store(left < LANES ? line : p, v);
  if (left < LANES && left > 0) memcpy(p, line, (size_t)left * sizeof(uint16_t));
}

// row [2 * units] -> unit u in every lane.
INLINE U32x16 bf16_broadcast_unit(const uint16_t *row, long u) {
  uint32_t w;
  memcpy(&w, row + 2 * u, sizeof w);
  return w + (U32x16){0};
}

// acc + the sum of the two products of a unit's elements, lane by lane.
INLINE F32x16 bf16_mac(F32x16 acc, U32x16 w, U32x16 x) {
#ifdef NATIVE_BF16
  return (F32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc += (F32x16)(w & 0xffff0000u) * (F32x16)(x & 0xffff0000u);
  return acc + (F32x16)(w << 16) * (F32x16)(x << 16);
#endif
}
