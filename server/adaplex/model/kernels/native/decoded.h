// Products of more rows than a tile has: a block of a panel is decoded to fp32 once, into the first-level
// cache, and multiplied by all rows. Only for registers narrower than a panel: wider ones hold tiles of so
// many rows that decoding is a small part of a tile.

#pragma once

#include "code_values.h"
#include "group_scale.h"
#include "sizes.h"
#include "units.h"

#if VEC_LANES < PANEL

#define CHUNK_ROWS 48    // rows that share a decoded block
#define BLOCK_INPUTS 64  // inputs of a decoded block: 4 KiB
#define DECODED_ROWS (VEC_LANES == 8 ? 6 : 3)  // rows of a tile of a decoded block

// The sums of a chunk of rows for one panel. `total`: of whole groups; `part`: of a group that is not whole.
typedef struct {
  _Alignas(64) float total[CHUNK_ROWS][PANEL], part[CHUNK_ROWS][PANEL];
} ChunkSums;

// A decoded block [inputs, 16], and what becomes of its sums: `from_zero` begins them anew; `ends_group` adds
// them to the totals with the scale [PANEL_VECS] of the group.
typedef struct {
  const float *weights;
  long inputs;
  int from_zero, ends_group, nf4;
  GroupScale scale[PANEL_VECS];
  const float *minus_sums;  // [rows] of the chunk, unless nf4
} DecodedBlock;

// lines: codes of `inputs` inputs -> to [inputs, 16].
static inline void decode_codes(const CodeValues *values, const char *lines, long inputs, float *to) {
  for (long line = 0; line < inputs / 8; line++, lines += 64) {
    prefetch(lines + BLOCK_INPUTS * 8);
    UNROLL for (int j = 0; j < 4; j++) {
      VecU32 words[PANEL_VECS];
      decode_unit(values, lines, j, words);
      UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        pair_Unit unit = pair_unit(words[v]);
        f32_store(to + (8 * line + 2 * j) * PANEL + v * VEC_LANES, unit.first);
        f32_store(to + (8 * line + 2 * j + 1) * PANEL + v * VEC_LANES, unit.second);
      }
    }
  }
}

// units: bf16 units of `inputs` inputs, an even number -> to [inputs, 16].
static inline void decode_bf16(const char *units, long inputs, float *to) {
  for (long u = 0; u < inputs / 2; u++, units += 64) {
    prefetch(units + BLOCK_INPUTS / 2 * 64);
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
      pair_Unit unit = pair_unit(load_words(units + v * 4 * VEC_LANES));
      f32_store(to + 2 * u * PANEL + v * VEC_LANES, unit.first);
      f32_store(to + (2 * u + 1) * PANEL + v * VEC_LANES, unit.second);
    }
  }
}

// x [R, inputs], rows x_stride apart: the rows of the chunk from `row` on. Adds their products by the block.
INLINE void decoded_tile(const DecodedBlock *block, const float *x, long x_stride, ChunkSums *sums, long row,
                         const int R) {
  VecF32 acc[DECODED_ROWS][PANEL_VECS];
  float(*part)[PANEL] = sums->part + row, (*total)[PANEL] = sums->total + row;
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < PANEL_VECS; v++)
      acc[r][v] = block->from_zero ? (VecF32){0} : f32_load(part[r] + v * VEC_LANES);
  const float *w = block->weights;
  for (long i = 0; i < block->inputs; i++, w += PANEL) {
    VecF32 weight[PANEL_VECS];
    UNROLL for (int v = 0; v < PANEL_VECS; v++) weight[v] = f32_load(w + v * VEC_LANES);
    UNROLL for (int r = 0; r < R; r++) {
      VecF32 input = splat(x[r * x_stride + i]);
      UNROLL for (int v = 0; v < PANEL_VECS; v++) acc[r][v] += weight[v] * input;
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
      float *to = total[r] + v * VEC_LANES;
      if (!block->ends_group)
        f32_store(part[r] + v * VEC_LANES, acc[r][v]);
      else if (block->nf4)
        f32_store(to, add_group(f32_load(to), acc[r][v], block->scale[v], 1, 0));
      else
        f32_store(to, add_group(f32_load(to), acc[r][v], block->scale[v], 0, block->minus_sums[row + r]));
    }
}

#define DECODED_TILE(R) \
  case R: decoded_tile(block, x + row * x_stride, x_stride, sums, row, R); break;

// x [rows, inputs], rows x_stride apart: all rows of the chunk, in tiles of nearly equal numbers of rows.
static inline void multiply_decoded_block(const DecodedBlock *block, const float *x, long x_stride,
                                          ChunkSums *sums, long rows) {
  long tiles = (rows + DECODED_ROWS - 1) / DECODED_ROWS;
  for (long tile = 0, row = 0; tile < tiles; tile++) {
    long count = (rows - row + tiles - tile - 1) / (tiles - tile);
    switch (count) {
      DECODED_TILE(1)
      DECODED_TILE(2)
      DECODED_TILE(3)
#if DECODED_ROWS > 3
      DECODED_TILE(4)
      DECODED_TILE(5)
      DECODED_TILE(6)
#endif
    }
    row += count;
  }
}
#undef DECODED_TILE
#endif
