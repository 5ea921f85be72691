// Vectors of fp32 lanes of the processor's own width, and loads and stores of the two element types, fp32 and
// bf16.
//
// GCC compiles vector types of this width to one register each: AVX-512, AVX2, SSE2 or NEON, as the library's
// flags allow. A wider type would live on the stack. Intrinsics are used only for AVX512-BF16, maxima, the
// shuffles of code_values.h, and the products of integers of int8_head.c.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_BF16 1
#endif

// fp32 lanes of a register, and the largest tiles that fit all registers. TILE_PANELS(R) panels are
// multiplied by R rows at once, CODE_PANELS(R) of those in codes, whose decoding takes registers: few rows
// need several panels, so that the additions to one sum need not wait for each other.
#if defined(__AVX512F__)
#define VEC_LANES 16
#define TILE_ROWS 8
#define TILE_PANELS(R) ((R) <= 2 ? 4 : 2)
#define CODE_PANELS(R) TILE_PANELS(R)
#elif defined(__AVX__)
#define VEC_LANES 8
#define TILE_ROWS 4
#define TILE_PANELS(R) ((R) == 1 ? 4 : (R) == 2 ? 2 : 1)
#define CODE_PANELS(R) ((R) == 1 ? 2 : 1)
#else
#define VEC_LANES 4
#if defined(__aarch64__)
#define TILE_ROWS 4
#else
#define TILE_ROWS 2
#endif
#define TILE_PANELS(R) 1
#define CODE_PANELS(R) 1
#endif

#define PANEL 16  // output columns of a panel, and tokens of a block of keys
#define PANEL_VECS (PANEL / VEC_LANES)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float VecF32 __attribute__((vector_size(4 * VEC_LANES)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * VEC_LANES)));
typedef int32_t VecI32 __attribute__((vector_size(4 * VEC_LANES)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * VEC_LANES)));

// x in every lane.
INLINE VecF32 splat(float x) { return x - (VecF32){0}; }

// The number of each lane.
INLINE VecI32 lane_numbers(void) {
  VecI32 lane;
  for (int i = 0; i < VEC_LANES; i++) lane[i] = i;
  return lane;
}

// p [VEC_LANES] words of four bytes.
INLINE VecU32 load_words(const void *p) {
  VecU32 w;
  memcpy(&w, p, sizeof w);
  return w;
}

// p [bytes] -> words; the bytes after them are zero, and all if `bytes` is negative.
INLINE VecU32 load_partial(const void *p, long bytes) {
  VecU32 w = {0};
  if (bytes >= (long)sizeof w) return load_words(p);
  if (bytes > 0) memcpy(&w, p, (size_t)bytes);
  return w;
}

// Prefetches the cache line at p into all cache levels. Products prefetch the panel after the current
// one, since a panel is too short for the hardware prefetcher. p may lie beyond the end of an array.
INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

// Prefetches the cache line at p into the second-level cache, for data that is read later.
INLINE void prefetch_later(const void *p) { __builtin_prefetch(p, 0, 2); }

// The sum of all lanes, by a fixed tree of additions, so that its bits do not depend on the caller.
INLINE float sum_lanes(VecF32 v) {
#if VEC_LANES == 16
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = v[i] + v[i + 8];
  float quarter[4];
  for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
#elif VEC_LANES == 8
  float quarter[4];
  for (int i = 0; i < 4; i++) quarter[i] = v[i] + v[i + 4];
#else
  VecF32 quarter = v;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

#if VEC_LANES == 16
// Lanes 0-7: first half of a plus its second half; lanes 8-15: the same of b. add_quarters and add_pairs
// do the same within each half and each quarter.
INLINE VecF32 add_halves(VecF32 a, VecF32 b) {
  return __builtin_shuffle(a, b, (VecI32){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
         __builtin_shuffle(a, b, (VecI32){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}

INLINE VecF32 add_quarters(VecF32 a, VecF32 b) {
  return __builtin_shuffle(a, b, (VecI32){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, (VecI32){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

INLINE VecF32 add_pairs(VecF32 a, VecF32 b) {
  return __builtin_shuffle(a, b, (VecI32){0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
         __builtin_shuffle(a, b, (VecI32){2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
}

// v [R] vectors, R at most 8 -> sums [R]: sum_lanes of each, with the same bits.
INLINE void lane_sums(const VecF32 *v, const int R, float *sums) {
  VecF32 half[4], quarter[2];
#define AT(i) ((i) < R ? (i) : R - 1)
  UNROLL for (int i = 0; i < 4; i++) half[i] = add_halves(v[AT(2 * i)], v[AT(2 * i + 1)]);
#undef AT
  UNROLL for (int i = 0; i < 2; i++) quarter[i] = add_quarters(half[2 * i], half[2 * i + 1]);
  VecF32 pair = add_pairs(quarter[0], quarter[1]);
  pair += __builtin_shuffle(pair, (VecI32){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  for (int r = 0; r < R; r++) sums[r] = pair[2 * r];
}
#else
// v [R] vectors -> sums [R]: sum_lanes of each.
INLINE void lane_sums(const VecF32 *v, const int R, float *sums) {
  for (int r = 0; r < R; r++) sums[r] = sum_lanes(v[r]);
}
#endif

// The nearest integers of lanes below 2^22, ties to even, by an operation that no compiler joins with a
// multiplication before it where it could round otherwise.
INLINE VecI32 round_lanes(VecF32 v) {
#if VEC_LANES == 16
  return (VecI32)_mm512_cvtps_epi32((__m512)v);
#elif VEC_LANES == 8
  return (VecI32)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
  return (VecI32)_mm_cvtps_epi32((__m128)v);
#elif defined(__aarch64__)
  return (VecI32)vcvtnq_s32_f32((float32x4_t)v);
#else
  VecI32 n;
  for (int i = 0; i < VEC_LANES; i++) n[i] = (int32_t)rintf(v[i]);
  return n;
#endif
}

// `yes` in lanes where the mask is -1, `no` where it is 0.
INLINE VecF32 select_lanes(VecI32 mask, VecF32 yes, VecF32 no) {
  return (VecF32)(((VecI32)yes & mask) | ((VecI32)no & ~mask));
}

// The larger of each lane, `b` if either is NaN.
INLINE VecF32 max_vectors(VecF32 a, VecF32 b) {
#if VEC_LANES == 16
  return (VecF32)_mm512_max_ps((__m512)a, (__m512)b);
#elif VEC_LANES == 8
  return (VecF32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select_lanes(a > b, a, b);
#endif
}

// The largest of all lanes, none of which is NaN.
INLINE float max_lanes(VecF32 v) {
  UNROLL for (int distance = VEC_LANES / 2; distance; distance /= 2)
    v = max_vectors(v, __builtin_shuffle(v, lane_numbers() ^ distance));
  return v[0];
}

// exp(x) of each lane within 2 ulp; 0 below -87, exp(88) above 88, NaN for NaN. Cody and Waite's
// reduction, then Cephes' polynomial.
INLINE VecF32 exp_lanes(VecF32 x) {
  VecI32 under = x<splat(-87.0f), over = x> splat(88.0f), nan = x != x;
  VecF32 safe = select_lanes(under | nan, splat(-87.0f), select_lanes(over, splat(88.0f), x));
  VecF32 shifted = safe * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  VecF32 n = shifted - 12582912.0f;
  VecF32 r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  VecI32 exponent = __builtin_convertvector(n, VecI32);
  VecF32 scaled = (VecF32)((VecI32)p + (exponent << 23));
  return select_lanes(nan, x, select_lanes(under, (VecF32){0}, scaled));
}

// fp32.

INLINE float f32_widen(float x) { return x; }
INLINE float f32_narrow(float x) { return x; }

// p [VEC_LANES].
INLINE VecF32 f32_load(const float *p) {
  VecF32 v;
  memcpy(&v, p, sizeof v);
  return v;
}

// p [VEC_LANES] = v.
INLINE void f32_store(float *p, VecF32 v) { memcpy(p, &v, sizeof v); }

// p [left] -> the first lanes of them, zero in lanes beyond `left`, which may be negative.
INLINE VecF32 f32_load_partial(const float *p, long left) {
  return (VecF32)load_partial(p, left * (long)sizeof(float));
}

// p [left] = the first `left` lanes of v, all if `left` is larger, none if it is negative.
INLINE void f32_store_partial(float *p, VecF32 v, long left) {
  if (left >= VEC_LANES)
    f32_store(p, v);
  else if (left > 0)
    memcpy(p, &v, (size_t)left * sizeof(float));
}

// bf16.

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

// p [VEC_LANES], widened to fp32.
INLINE VecF32 bf16_load(const uint16_t *p) {
  VecU16 h;
  memcpy(&h, p, sizeof h);
  return (VecF32)(__builtin_convertvector(h, VecU32) << 16);
}

// p [left], as f32_load_partial.
INLINE VecF32 bf16_load_partial(const uint16_t *p, long left) {
  VecU16 h = {0};
  if (left >= VEC_LANES) return bf16_load(p);
  if (left > 0) memcpy(&h, p, (size_t)left * sizeof(uint16_t));
  return (VecF32)(__builtin_convertvector(h, VecU32) << 16);
}

// p [VEC_LANES] = v, rounded to nearest, ties to even; NaN gives NaN.
INLINE void bf16_store(uint16_t *p, VecF32 v) {
#ifdef NATIVE_BF16
  VecU16 h = (VecU16)_mm512_cvtneps_pbh((__m512)v);
#else
  VecU32 w = (VecU32)v;
  VecU32 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  VecU32 nan = (VecU32)(v != v);
  VecU32 kept = (rounded & ~nan) | (((w >> 16) | 0x40) & nan);
  VecU16 h = __builtin_convertvector(kept, VecU16);
#endif
  memcpy(p, &h, sizeof h);
}

// p [left] = v, as f32_store_partial.
INLINE void bf16_store_partial(uint16_t *p, VecF32 v, long left) {
  uint16_t line[VEC_LANES];
  bf16_store(left < VEC_LANES ? line : p, v);
  if (left < VEC_LANES && left > 0) memcpy(p, line, (size_t)left * sizeof(uint16_t));
}
