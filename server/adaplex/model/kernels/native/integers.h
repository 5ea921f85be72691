// Products of 4-bit codes by activations of 8 bits, which the setting cpu_activations turns on.
//
// x is quantized in blocks of 32 inputs: x = scale * q with q from -127 to 127. The sum of code * q over a
// block is exact in int32, so its bits depend on nothing but the row; y adds up such sums in fp32, block by
// block: y += (sum of code * q) * (scale of the group * scale of the block). nf4 codes stand for integers,
// NF4_UNITS of which are 1; int4 codes for themselves, with zero * (sum of q) subtracted for each block.
// Their slow reference is int8_product in adaplex/model/kernels/reference.py.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "prefetch.h"
#include "types.h"
#include "units.h"

#define QUANTIZED_BLOCK 32  // inputs of a row that share a scale
#define INT8_LARGEST 127
// Integers that make 1 in nf4: the number that rounds the table best. VNNI takes integers of 8 bits; pairs of
// products are added in 16 bits elsewhere, which leaves the integers 7.
#if defined(__AVX512VNNI__)
#define NF4_UNITS 112.04f
#else
#define NF4_UNITS 63.34f
#endif

// Quantized rows. Within each eight inputs, `values` are in the order in which the codes of a line are
// decoded: see quantize.h.
typedef struct {
  int8_t *values;     // [rows, in]
  float *scales;      // [rows, in / 32]
  float *minus_sums;  // [rows, in / 32]: minus the sum of a block's values
} QuantizedRows;

// One tile of a product, from panel `panel` on.
typedef struct {
  const Weight *weight;
  const float *zeros;  // [panels, in / group, 16], replacing those of the scales; or null
  long panel;
  QuantizedRows rows;
  const PrefetchPlan *plan;  // or null
  RowBlock block;
} IntegerTile;

// Bytes of quantized rows of `in_features` inputs. quantized_rows divides as many, from `start` on.
static inline size_t quantized_bytes(long rows, long in_features) {
  long blocks = (in_features + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
  return (size_t)(rows * blocks) * (2 * sizeof(float) + QUANTIZED_BLOCK);
}

static inline QuantizedRows quantized_rows(void *start, long rows, long in_features) {
  long blocks = (in_features + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
  float *scales = start, *minus_sums = scales + rows * blocks;
  return (QuantizedRows){(int8_t *)(minus_sums + rows * blocks), scales, minus_sums};
}

// The rows from `row` on.
static inline QuantizedRows quantized_from(QuantizedRows rows, long row, long in_features) {
  long blocks = in_features / QUANTIZED_BLOCK;
  return (QuantizedRows){rows.values + row * in_features, rows.scales + row * blocks,
                         rows.minus_sums + row * blocks};
}

// NF4_UNITS, for Python.
extern const float nf4_units;

// sums[r][v] = x[r] W[vector v of the columns of all panels]', for up to TILE_ROWS rows and as many panels as
// a Tile holds.
void multiply_integers(const IntegerTile *tile, int rows, int panels, Tile sums);
