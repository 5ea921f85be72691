// Values of 4-bit codes: 16 bf16 values, and the decoding of lines of codes.
//
// A line is 64 bytes, the codes of eight inputs in 16 columns: four units of two inputs. Wide lines, for
// AVX512: half (n, p) of two bytes has in nibble j the code of column n at input 2 j + p of the line. Narrow
// lines, for the others: byte 32 h + 16 l + 8 v + 2 c + p is of column 8 v + 4 l + c, and has in its low half
// the code of input 4 h + p, in its high half that of input 4 h + 2 + p. So one byte shuffle looks up 32
// codes.

#pragma once

#include "vectors.h"

#if defined(__AVX512BW__)
#define WIDE_LINES 1
#else
#define WIDE_LINES 0
#endif

// value [32]: the 16 values twice, so that the fifth bit of an index has no effect. low, high [16]: the low
// and high bytes of the values, for byte shuffles.
typedef struct {
  _Alignas(64) uint16_t value[32];
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

// line [64]. The place of the code of a column at an input of its line: a byte of it, and a shift in the
// byte.
typedef struct {
  int byte, shift;
} CodePlace;

static inline CodePlace code_place(int column, int input) {
#if WIDE_LINES
  return (CodePlace){4 * column + 2 * (input % 2) + input / 4, input / 2 % 2 * 4};
#else
  int vec = column / 8, lane = column / 4 % 2;
  return (CodePlace){input / 4 * 32 + 16 * lane + 8 * vec + column % 4 * 2 + input % 2, input / 2 % 2 * 4};
#endif
}

// line [64], w [PANEL_VECS]. w = the bf16 values of inputs 2 j and 2 j + 1 of the line, for all columns.
INLINE void decode_unit(const CodeValues *values, const char *line, const int j, VecU32 *w) {
#if WIDE_LINES
  __m512i index = _mm512_srli_epi16((__m512i)load_words(line), (unsigned)(4 * j));
  w[0] = (VecU32)_mm512_permutexvar_epi16(index, _mm512_load_si512(values->value));
#elif defined(__AVX2__)
  __m256i codes = _mm256_loadu_si256((const __m256i *)(line + j / 2 * 32));
  if (j % 2) codes = _mm256_srli_epi16(codes, 4);
  codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
  __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values->low));
  __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values->high));
  low = _mm256_shuffle_epi8(low, codes);
  high = _mm256_shuffle_epi8(high, codes);
  w[0] = (VecU32)_mm256_unpacklo_epi8(low, high);
  w[1] = (VecU32)_mm256_unpackhi_epi8(low, high);
#else
  for (int v = 0; v < PANEL_VECS; v++)
    for (int n = 0; n < VEC_LANES; n++) {
      CodePlace even = code_place(v * VEC_LANES + n, 2 * j), odd = code_place(v * VEC_LANES + n, 2 * j + 1);
      uint32_t first = values->value[(uint8_t)line[even.byte] >> even.shift & 15];
      w[v][n] = first | (uint32_t)values->value[(uint8_t)line[odd.byte] >> odd.shift & 15] << 16;
    }
#endif
}
