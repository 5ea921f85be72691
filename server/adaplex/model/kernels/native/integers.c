// Tiles of products of codes by integers; see integers.h.
//
// The processor multiplies unsigned bytes by signed ones, so the bytes of nf4 are its integers and NF4_OFFSET
// more, those of int4 its codes and 8 more. Four neighbouring inputs of a column are the four bytes of a lane.

#include "integers.h"

#include "code_values.h"
#include "group_scale.h"
#include "sizes.h"

#define BLOCK_LINES (QUANTIZED_BLOCK / 8)
#define INT4_OFFSET 8
#define INTEGER_PANELS(R) (VEC_LANES == 16 || (R) == 1 ? 2 : 1)  // panels of a tile of R rows

// The bytes of the 16 codes, once for each 16 lanes of a byte shuffle.
#if defined(__AVX512VNNI__)
#define NF4_OFFSET 128
#define NF4_BYTES 16, 50, 69, 84, 96, 107, 118, 128, 137, 146, 156, 166, 177, 191, 209, 240
#else
#define NF4_OFFSET 64
#define NF4_BYTES 1, 20, 31, 39, 46, 52, 58, 64, 69, 74, 80, 85, 92, 100, 110, 127
#endif
static const _Alignas(64) uint8_t nf4_bytes[64] = {NF4_BYTES, NF4_BYTES, NF4_BYTES, NF4_BYTES};

const float nf4_units = NF4_UNITS;

// VNNI multiplies and adds four bytes of a lane at once. Else the sums of pairs fit 16 bits: one of nf4, and
// those of a whole block of int4, which are added before they are widened.
#if defined(__AVX512VNNI__) || defined(__AVX512BW__) || defined(__AVX2__)
#define HAS_BYTE_PRODUCTS 1
#else
#define HAS_BYTE_PRODUCTS 0
#endif

#if VEC_LANES == 16
#define BYTES(name, ...) ((VecI32)_mm512_##name(__VA_ARGS__))
#define AS_BYTES(v) ((__m512i)(v))
#else
#define BYTES(name, ...) ((VecI32)_mm256_##name(__VA_ARGS__))
#define AS_BYTES(v) ((__m256i)(v))
#endif

#if HAS_BYTE_PRODUCTS
typedef int16_t VecPairs __attribute__((vector_size(4 * VEC_LANES)));

// codes: one of 0 to 15 in each byte -> their bytes.
INLINE VecU32 bytes_of_codes(VecU32 codes, const int nf4) {
  if (!nf4) return codes;
  return (VecU32)BYTES(shuffle_epi8, AS_BYTES(load_words(nf4_bytes)), AS_BYTES(codes));
}

// line [64], w [PANEL_VECS]. w = the bytes of four inputs in all columns: those of the first or second half
// of the line, in the order of quantize.h.
INLINE void integer_units(const char *line, const int half, const int nf4, VecU32 *w) {
#if WIDE_LINES
  VecU32 codes = load_words(line);
  w[0] = bytes_of_codes((half ? codes >> 4 : codes) & 0x0f0f0f0fu, nf4);
#else
  VecU32 codes = load_words(line + half * 32);
  __m256i low = AS_BYTES(bytes_of_codes(codes & 0x0f0f0f0fu, nf4));
  __m256i high = AS_BYTES(bytes_of_codes(codes >> 4 & 0x0f0f0f0fu, nf4));
  w[0] = (VecU32)_mm256_unpacklo_epi16(low, high);
  w[1] = (VecU32)_mm256_unpackhi_epi16(low, high);
#endif
}

// acc + w * x, four bytes of each lane.
INLINE VecI32 add_products(VecI32 acc, VecU32 w, VecU32 x, const int nf4) {
#if defined(__AVX512VNNI__)
  (void)nf4;
  return BYTES(dpbusd_epi32, AS_BYTES(acc), AS_BYTES(w), AS_BYTES(x));
#else
  VecPairs pairs = (VecPairs)BYTES(maddubs_epi16, AS_BYTES(w), AS_BYTES(x));
  if (!nf4) return (VecI32)((VecPairs)acc + pairs);
  return acc + BYTES(madd_epi16, AS_BYTES(pairs), AS_BYTES((VecPairs){0} + 1));
#endif
}

// The sums of a block as int32.
INLINE VecI32 whole_sums(VecI32 acc, const int nf4) {
#if defined(__AVX512VNNI__)
  (void)nf4;
  return acc;
#else
  return nf4 ? acc : BYTES(madd_epi16, AS_BYTES(acc), AS_BYTES((VecPairs){0} + 1));
#endif
}
#else
// line [64], w [PANEL_VECS]. As above.
INLINE void integer_units(const char *line, const int half, const int nf4, VecU32 *w) {
  for (int v = 0; v < PANEL_VECS; v++)
    for (int n = 0; n < VEC_LANES; n++) {
      w[v][n] = 0;
      for (int i = 0; i < 4; i++) {
        CodePlace at = code_place(v * VEC_LANES + n, 4 * half + i);
        int code = (uint8_t)line[at.byte] >> at.shift & 15;
        w[v][n] |= (uint32_t)(nf4 ? nf4_bytes[code] : code) << 8 * i;
      }
    }
}

INLINE VecI32 add_products(VecI32 acc, VecU32 w, VecU32 x, const int nf4) {
  (void)nf4;
  for (int i = 0; i < 4; i++) acc += (VecI32)(w >> 8 * i & 255) * ((VecI32)(x << (24 - 8 * i)) >> 24);
  return acc;
}

INLINE VecI32 whole_sums(VecI32 acc, const int nf4) {
  (void)nf4;
  return acc;
}
#endif

// panel [P]: the codes of a block in each panel; x [R, 32], rows x_stride apart. acc[r][v] = the sums of the
// block. minus_sums [R], rows `blocks` apart.
INLINE void multiply_block(const char *const *panel, const int8_t *x, long x_stride, const float *minus_sums,
                           long blocks, const int nf4, const int R, const int P, VecI32 *acc) {
  const int vecs = P * PANEL_VECS;
  UNROLL for (int r = 0; r < R; r++) {
    const VecI32 start = (VecI32){0} + (nf4 ? (int32_t)minus_sums[r * blocks] * NF4_OFFSET : 0);
    UNROLL for (int v = 0; v < vecs; v++) acc[r * vecs + v] = start;
  }
  UNROLL for (int quad = 0; quad < QUANTIZED_BLOCK / 4; quad++) {
    VecU32 w[2 * PANEL_VECS];
    UNROLL for (int p = 0; p < P; p++)
      integer_units(panel[p] + quad / 2 * 64, quad % 2, nf4, w + p * PANEL_VECS);
    UNROLL for (int r = 0; r < R; r++) {
      uint32_t four;
      memcpy(&four, x + r * x_stride + quad * 4, sizeof four);
      const VecU32 spread = (VecU32){0} + four;
      UNROLL for (int v = 0; v < vecs; v++)
        acc[r * vecs + v] = add_products(acc[r * vecs + v], w[v], spread, nf4);
    }
  }
  UNROLL for (int i = 0; i < R * vecs; i++) acc[i] = whole_sums(acc[i], nf4);
}

// The sums of R rows and the P panels from `panel` on, to vectors `column` and on of `sums`. The last panel
// is multiplied P times if there are not P.
INLINE void integer_tile(const IntegerTile *tile, long panel, long last, int column, const int nf4,
                         const int R, const int P, Tile sums) {
  const Weight *weight = tile->weight;
  const int vecs = P * PANEL_VECS;
  const long in = weight->in_features, blocks = in / QUANTIZED_BLOCK;
  const long group = nf4 ? NF4_GROUP : weight->group, groups = in / group;
  const char *codes = (const char *)weight->panels + panel * in * 8;
  const char *next = share_start(codes + P * in * 8, in / 8, tile->block);
  const long next_stride = share_stride(tile->block), other = panel + 1 < last ? 1 : 0;
  VecF32 total[TILE_ROWS * 2 * PANEL_VECS];
  UNROLL for (int i = 0; i < R * vecs; i++) total[i] = (VecF32){0};
  GroupScale scale[2 * PANEL_VECS];
  for (long b = 0; b < blocks; b++) {
    const long place = b * QUANTIZED_BLOCK;
    if (place % group == 0)
      UNROLL for (int v = 0; v < vecs; v++) {
        const long at = (panel + v / PANEL_VECS * other) * groups + place / group;
        scale[v] = group_scale(weight, nf4, tile->zeros, at, v % PANEL_VECS);
        if (!nf4) scale[v].zero += INT4_OFFSET;
      }
    UNROLL for (int line = 0; line < BLOCK_LINES; line++) {
      if (tile->plan) prefetch_share(tile->plan, b * BLOCK_LINES + line);
      UNROLL for (int p = 0; p < P; p++)
        prefetch(next + p * in * 8 + (b * BLOCK_LINES + line) * next_stride);
    }
    const char *from[2] = {codes + place * 8, codes + (other * in + place) * 8};
    VecI32 acc[TILE_ROWS * 2 * PANEL_VECS];
    multiply_block(from, tile->rows.values + place, in, tile->rows.minus_sums + b, blocks, nf4, R, P, acc);
    UNROLL for (int r = 0; r < R; r++) {
      const VecF32 of_block = splat(tile->rows.scales[r * blocks + b]);
      const VecF32 minus_sum = splat(tile->rows.minus_sums[r * blocks + b]);
      UNROLL for (int v = 0; v < vecs; v++) {
        VecF32 sum = __builtin_convertvector(acc[r * vecs + v], VecF32);
        if (!nf4) sum += scale[v].zero * minus_sum;
        total[r * vecs + v] += sum * (scale[v].scale * of_block);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < vecs; v++)
      if (v / PANEL_VECS <= other)
        sums[r][column + v] = nf4 ? total[r * vecs + v] * (1 / NF4_UNITS) : total[r * vecs + v];
}

#define INTEGER_TILE(R)                                                                             \
  case R:                                                                                           \
    for (long panel = tile->panel; panel < last; panel += INTEGER_PANELS(R)) {                      \
      const int column = (int)(panel - tile->panel) * PANEL_VECS;                                   \
      if (tile->weight->group)                                                                      \
        integer_tile(tile, panel, last, column, 0, R, INTEGER_PANELS(R), sums);                     \
      else                                                                                          \
        integer_tile(tile, panel, last, column, 1, R, INTEGER_PANELS(R), sums);                     \
    }                                                                                               \
    break;

void multiply_integers(const IntegerTile *tile, int rows, int panels, Tile sums) {
  const long last = tile->panel + panels;
  switch (rows) {
    INTEGER_TILE(1)
    INTEGER_TILE(2)
#if TILE_ROWS > 2
    INTEGER_TILE(3)
    INTEGER_TILE(4)
#endif
#if TILE_ROWS > 4
    INTEGER_TILE(5)
    INTEGER_TILE(6)
    INTEGER_TILE(7)
    INTEGER_TILE(8)
#endif
  }
}
