// Sixteen fp32 lanes, and the element types that are stored: fp32 and bf16.
//
// GCC's vectors become AVX-512, AVX2 or plain instructions, whichever the library is built for; only
// what they cannot say is written for AVX512-BF16 and AVX512-BW.

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

typedef float vec __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(64)));
typedef uint16_t half_line __attribute__((vector_size(32)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE words load_words(const void *p) {
  words w;
  memcpy(&w, p, sizeof w);
  return w;
}

// The first `bytes` of a line, the rest zero.
INLINE words load_part(const void *p, long bytes) {
  words w = {0};
  memcpy(&w, p, (size_t)bytes);
  return w;
}

// The same line of what is read next is on its way while this one is worked on: a panel is too short
// for the processor to guess how it goes on. Harmless beyond the end.
INLINE void expect(const void *p) { __builtin_prefetch(p); }

// The same for what is not read so soon: into the second cache only.
INLINE void expect_later(const void *p) { __builtin_prefetch(p, 0, 2); }

// Always the same tree, so that a sum has the same bits wherever it is taken.
INLINE float sum_lanes(vec v) {
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = v[i] + v[i + 8];
  float quarter[4];
  for (int i = 0; i < 4; i++) quarter[i] = half[i] + half[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Of the first and the second half of both, the sum: a's before b's. So on with quarters and pairs.
INLINE vec fold_halves(vec a, vec b) {
  return __builtin_shuffle(a, b, (ints){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
         __builtin_shuffle(a, b, (ints){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}

INLINE vec fold_quarters(vec a, vec b) {
  return __builtin_shuffle(a, b, (ints){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, (ints){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

INLINE vec fold_pairs(vec a, vec b) {
  return __builtin_shuffle(a, b, (ints){0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
         __builtin_shuffle(a, b, (ints){2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
}

// sum_lanes of each of R vectors, that of vector r in lane 2 r.
INLINE vec sums_of_lanes(const vec *v, const int R) {
  vec half[4], quarter[2];
#define AT(i) ((i) < R ? (i) : R - 1)
  UNROLL for (int i = 0; i < 4; i++) half[i] = fold_halves(v[AT(2 * i)], v[AT(2 * i + 1)]);
#undef AT
  UNROLL for (int i = 0; i < 2; i++) quarter[i] = fold_quarters(half[2 * i], half[2 * i + 1]);
  vec pair = fold_pairs(quarter[0], quarter[1]);
  return pair + __builtin_shuffle(pair, (ints){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

INLINE float max_lanes(vec v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

INLINE vec select_lanes(ints mask, vec yes, vec no) {
  return (vec)(((ints)yes & mask) | ((ints)no & ~mask));
}

// exp(x) within 2 ulp; 0 below -87, NaN for NaN. Cody and Waite's reduction, then Cephes' polynomial.
INLINE vec exp_lanes(vec x) {
  ints under = x < splat(-87.0f), over = x > splat(88.0f), nan = x != x;
  vec safe = select_lanes(under | nan, splat(-87.0f), select_lanes(over, splat(88.0f), x));
  vec shifted = safe * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  vec n = shifted - 12582912.0f;
  vec r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ints exponent = __builtin_convertvector(n, ints);
  vec scaled = (vec)((ints)p + (exponent << 23));
  return select_lanes(nan, x, select_lanes(under, (vec){0}, scaled));
}

// fp32: one element a unit of four bytes.

INLINE float f32_widen(float x) { return x; }
INLINE float f32_narrow(float x) { return x; }

INLINE vec f32_load(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void f32_store(float *p, vec v) { memcpy(p, &v, sizeof v); }

// The first `left` lanes; none when it is negative, all when there are more.
INLINE vec f32_load_part(const float *p, long left) {
  if (left >= LANES) return f32_load(p);
  return left > 0 ? (vec)load_part(p, left * (long)sizeof(float)) : (vec){0};
}

INLINE void f32_store_part(float *p, vec v, long left) {
  if (left >= LANES)
    f32_store(p, v);
  else if (left > 0)
    memcpy(p, &v, (size_t)left * sizeof(float));
}

// Unit u of a row, in every lane.
INLINE words f32_unit(const float *row, long u) {
  uint32_t w;
  memcpy(&w, row + u, sizeof w);
  return w + (words){0};
}

INLINE vec f32_mac(vec acc, words w, words x) { return acc + (vec)w * (vec)x; }

// bf16: two neighbouring elements a unit, the first one in the low half.

INLINE float bf16_widen(uint16_t x) {
  uint32_t w = (uint32_t)x << 16;
  float f;
  memcpy(&f, &w, sizeof f);
  return f;
}

// Rounds to nearest, ties to even; a NaN stays one.
INLINE uint16_t bf16_narrow(float x) {
  uint32_t w;
  memcpy(&w, &x, sizeof w);
  if (x != x) return (uint16_t)((w >> 16) | 0x40);
  return (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

INLINE vec bf16_load(const uint16_t *p) {
  half_line h;
  memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, words) << 16);
}

INLINE vec bf16_load_part(const uint16_t *p, long left) {
  half_line h = {0};
  if (left >= LANES) return bf16_load(p);
  if (left > 0) memcpy(&h, p, (size_t)left * sizeof(uint16_t));
  return (vec)(__builtin_convertvector(h, words) << 16);
}

INLINE void bf16_store(uint16_t *p, vec v) {
#ifdef NATIVE_BF16
  half_line h = (half_line)_mm512_cvtneps_pbh((__m512)v);
#else
  words w = (words)v;
  words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  words nan = (words)(v != v);
  words kept = (rounded & ~nan) | (((w >> 16) | 0x40) & nan);
  half_line h = __builtin_convertvector(kept, half_line);
#endif
  memcpy(p, &h, sizeof h);
}

INLINE void bf16_store_part(uint16_t *p, vec v, long left) {
  uint16_t line[LANES];
  bf16_store(left < LANES ? line : p, v);
  if (left < LANES && left > 0) memcpy(p, line, (size_t)left * sizeof(uint16_t));
}

INLINE words bf16_unit(const uint16_t *row, long u) {
  uint32_t w;
  memcpy(&w, row + 2 * u, sizeof w);
  return w + (words){0};
}

INLINE vec bf16_mac(vec acc, words w, words x) {
#ifdef NATIVE_BF16
  return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc += (vec)(w & 0xffff0000u) * (vec)(x & 0xffff0000u);
  return acc + (vec)(w << 16) * (vec)(x << 16);
#endif
}

// Four bits a weight, looked up among sixteen bf16 values: given twice, so that only the low four bits
// of an index of five count, and by their bytes.

typedef struct {
  halves value;
  uint8_t low[16], high[16];
} Values;

// nf4: bitsandbytes' table.
static const Values NF4 = {
    {0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
     0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
     0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
     0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80},
    {0x80, 0x32, 0x06, 0xca, 0x92, 0x3d, 0xba, 0x00, 0xa3, 0x25, 0x7c, 0xad, 0xe2, 0x10, 0x39, 0x80},
    {0xbf, 0xbf, 0xbf, 0xbe, 0xbe, 0xbe, 0xbd, 0x00, 0x3d, 0x3e, 0x3e, 0x3e, 0x3e, 0x3f, 0x3f, 0x3f}};

// int4: -8 .. 7.
static const Values INT4 = {
    {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
     0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
     0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
     0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0},
    {0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80, 0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0},
    {0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf, 0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40}};

// Nibble j of each of 32 halves as a bf16 value.
INLINE words look_up(const Values *values, halves packed, int j) {
  halves index = packed >> (uint16_t)(4 * j);
#ifdef NATIVE_BF16
  return (words)_mm512_permutexvar_epi16((__m512i)index, (__m512i)values->value);
#elif defined(__AVX2__)
  // Looked up by bytes: the nibble stands in both bytes of its half.
  index &= 15;
  index |= index << 8;
  __m256i parts[2];
  __m128i lows, highs;
  memcpy(parts, &index, sizeof parts);
  memcpy(&lows, values->low, sizeof lows);
  memcpy(&highs, values->high, sizeof highs);
  for (int i = 0; i < 2; i++) {
    __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lows), parts[i]);
    __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(highs), parts[i]);
    parts[i] = _mm256_blendv_epi8(low, high, _mm256_set1_epi16((short)0xff00));
  }
  words found;
  memcpy(&found, parts, sizeof found);
  return found;
#else
  index &= 15;
  halves found;
  for (int i = 0; i < 32; i++) found[i] = values->value[index[i]];
  return (words)found;
#endif
}
