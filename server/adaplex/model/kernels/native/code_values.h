// Values of 4-bit codes: 16 bf16 values, and their lookup.

#pragma once

#include "vectors.h"

// value [32]: the 16 values twice, so that the fifth bit of an index has no effect. low, high [16]: the low
// and high bytes of the values, for byte shuffles.
typedef struct {
  U16x32 value;
  uint8_t low[16], high[16];
} CodeValues;

// nf4: the table of bitsandbytes.
static const CodeValues NF4 = {
    {0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c,
     0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80, 0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d,
     0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80},
    {0x80, 0x32, 0x06, 0xca, 0x92, 0x3d, 0xba, 0x00, 0xa3, 0x25, 0x7c, 0xad, 0xe2, 0x10, 0x39, 0x80},
    {0xbf, 0xbf, 0xbf, 0xbe, 0xbe, 0xbe, 0xbd, 0x00, 0x3d, 0x3e, 0x3e, 0x3e, 0x3e, 0x3f, 0x3f, 0x3f}};

// int4: -8 to 7.
static const CodeValues INT4 = {
    {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
     0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
     0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0},
    {0x00, 0xe0, 0xc0, 0xa0, 0x80, 0x40, 0x00, 0x80, 0x00, 0x80, 0x00, 0x40, 0x80, 0xa0, 0xc0, 0xe0},
    {0xc1, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xc0, 0xbf, 0x00, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40}};

// packed [32] of four codes each -> the bf16 values [32] of code j (bits 4 j to 4 j + 3) of each.
INLINE U32x16 look_up(const CodeValues *values, U16x32 packed, int j) {
  U16x32 index = packed >> (uint16_t)(4 * j);
#ifdef NATIVE_BF16
  return (U32x16)_mm512_permutexvar_epi16((__m512i)index, (__m512i)values->value);
#elif defined(__AVX2__)
  // Byte shuffles: the code is copied to both bytes of its half; one shuffle gives the low byte of the
  // value, the other the high byte.
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
  U32x16 found;
  memcpy(&found, parts, sizeof found);
  return found;
#else
  index &= 15;
  U16x32 found;
  for (int i = 0; i < 32; i++) found[i] = values->value[index[i]];
  return (U32x16)found;
#endif
}
