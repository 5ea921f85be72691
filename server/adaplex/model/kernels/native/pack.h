// Packing of weights into the panels of linear.h, when they are loaded. Columns beyond `out` are zero.

#pragma once

#include <stdint.h>
#include <string.h>

#include "vectors.h"

// weight [out, in] of elements of 4 / per_unit bytes -> panels [panels, in / per_unit, 16] units.
void pack_dense(const char *weight, int64_t out, int64_t in, int64_t per_unit, char *panels) {
  int64_t units = in / per_unit;
  memset(panels, 0, (size_t)((out + LANES - 1) / LANES * units * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t u = 0; u < units; u++)
      memcpy(panels + ((n / LANES * units + u) * LANES + n % LANES) * 4, weight + (n * units + u) * 4, 4);
}

// codes [out, in / 2] bytes of two 4-bit codes, the first in the high half -> panels [panels, in / 8, 32].
void pack_codes(const uint8_t *codes, int64_t out, int64_t in, uint16_t *panels) {
  int64_t lines = in / 8;
  memset(panels, 0, (size_t)((out + LANES - 1) / LANES * lines * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t v = 0; v < lines; v++) {
      const uint8_t *four = codes + n * in / 2 + v * 4;  // inputs 8 v .. 8 v + 7
      uint32_t even = 0, odd = 0;
      for (int j = 0; j < 4; j++) {
        even |= (uint32_t)(four[j] >> 4) << (4 * j);
        odd |= (uint32_t)(four[j] & 15) << (4 * j);
      }
      uint16_t *pair = panels + (n / LANES * lines + v) * 32 + n % LANES * 2;
      pair[0] = (uint16_t)even;
      pair[1] = (uint16_t)odd;
    }
}

// values [out, groups] of four bytes -> packed [panels, groups, 16].
void pack_groups(const uint32_t *values, int64_t out, int64_t groups, uint32_t *packed) {
  memset(packed, 0, (size_t)((out + LANES - 1) / LANES * groups * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t g = 0; g < groups; g++)
      packed[(n / LANES * groups + g) * LANES + n % LANES] = values[n * groups + g];
}

// b [rank, out] of elements of 4 / per_unit bytes -> packed [rank * out] in the panels of low_rank.h.
void pack_low_rank(const char *b, int64_t rank, int64_t out, int64_t per_unit, char *packed) {
  size_t size = (size_t)(4 / per_unit);
  for (int64_t first = 0; first < out; first += LANES) {
    int64_t last = first + LANES < out ? first + LANES : out;
    for (int64_t j = 0; j < rank; j += per_unit) {
      int64_t ranks = j + per_unit <= rank ? per_unit : rank - j;
      for (int64_t n = first; n < last; n++)
        for (int64_t i = 0; i < ranks; i++, packed += size)
          memcpy(packed, b + (size_t)((j + i) * out + n) * size, size);
    }
  }
}
