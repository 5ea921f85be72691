// The intrinsics of AVX512-BF16 and VNNI that the kernels use, in plain C, so that the code of that instruction
// set is tested on any processor. Compiled with __AVX512F__, __AVX512BW__, __AVX512VNNI__ and __AVX512BF16__
// defined by hand.

#pragma once

#include <stdint.h>
#include <string.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef short __m256bh __attribute__((vector_size(32)));
typedef long long __m512i __attribute__((vector_size(64)));

static inline float widened(uint32_t half) {
  uint32_t word = half << 16;
  float x;
  memcpy(&x, &word, sizeof x);
  return x;
}

static inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  uint32_t x[16], y[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; i++) {
    sums[i] += widened(x[i] >> 16) * widened(y[i] >> 16);
    sums[i] += widened(x[i] & 0xffff) * widened(y[i] & 0xffff);
  }
  return sums;
}

static inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  uint32_t word[16];
  uint16_t half[16];
  memcpy(word, &a, sizeof word);
  for (int i = 0; i < 16; i++)
    half[i] = a[i] != a[i] ? (uint16_t)(word[i] >> 16 | 0x40)
                           : (uint16_t)((word[i] + 0x7fff + (word[i] >> 16 & 1)) >> 16);
  __m256bh rounded;
  memcpy(&rounded, half, sizeof rounded);
  return rounded;
}

static inline __m512i _mm512_srli_epi16(__m512i a, unsigned bits) {
  uint16_t half[32];
  memcpy(half, &a, sizeof half);
  for (int i = 0; i < 32; i++) half[i] >>= bits;
  memcpy(&a, half, sizeof a);
  return a;
}

static inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i table) {
  uint16_t at[32], from[32], found[32];
  memcpy(at, &index, sizeof at);
  memcpy(from, &table, sizeof from);
  for (int i = 0; i < 32; i++) found[i] = from[at[i] & 31];
  memcpy(&index, found, sizeof index);
  return index;
}

static inline __m512i _mm512_shuffle_epi8(__m512i table, __m512i index) {
  uint8_t from[64], at[64], found[64];
  memcpy(from, &table, sizeof from);
  memcpy(at, &index, sizeof at);
  for (int i = 0; i < 64; i++) found[i] = at[i] & 128 ? 0 : from[i / 16 * 16 + (at[i] & 15)];
  memcpy(&index, found, sizeof index);
  return index;
}

static inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  int32_t sum[16];
  uint8_t x[64];
  int8_t y[64];
  memcpy(sum, &sums, sizeof sum);
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 64; i++) sum[i / 4] += x[i] * y[i];
  memcpy(&sums, sum, sizeof sums);
  return sums;
}

static inline __m512i _mm512_cvtps_epi32(__m512 a) {
  int32_t n[16];
  for (int i = 0; i < 16; i++) n[i] = (int32_t)__builtin_rintf(a[i]);
  __m512i rounded;
  memcpy(&rounded, n, sizeof rounded);
  return rounded;
}

static inline __m512i _mm512_load_si512(const void *p) {
  __m512i a;
  memcpy(&a, p, sizeof a);
  return a;
}

static inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  int16_t x[32], y[32];
  int32_t sums[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; i++) sums[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  memcpy(&a, sums, sizeof a);
  return a;
}

static inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
