// Packing of weights into the panels of linear.h when they are loaded, unpacking of codes, and the layouts of
// structs. Columns beyond `out` are zero.

#include <string.h>

#include "code_values.h"
#include "kernels.h"
#include "layouts.h"

// weight [out, in] of elements of 4 / per_unit bytes -> panels [panels, in / per_unit, 16] units.
void pack_dense(const char *weight, int64_t out, int64_t in, int64_t per_unit, char *panels) {
  int64_t units = in / per_unit;
  memset(panels, 0, (size_t)((out + PANEL - 1) / PANEL * units * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t u = 0; u < units; u++)
      memcpy(panels + ((n / PANEL * units + u) * PANEL + n % PANEL) * 4, weight + (n * units + u) * 4, 4);
}

// codes [out, in / 2] bytes of two 4-bit codes, the first in the high half -> panels [panels, in / 8] of
// lines as in code_values.h.
void pack_codes(const uint8_t *codes, int64_t out, int64_t in, uint8_t *panels) {
  int64_t lines = in / 8;
  memset(panels, 0, (size_t)((out + PANEL - 1) / PANEL * lines * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t v = 0; v < lines; v++) {
      const uint8_t *from = codes + n * in / 2 + v * 4;
      uint8_t *line = panels + (n / PANEL * lines + v) * 64;
      for (int i = 0; i < 8; i++) {
        CodePlace at = code_place((int)(n % PANEL), i);
        line[at.byte] |= (uint8_t)((i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4) << at.shift);
      }
    }
}

// panels of pack_codes -> codes [out, in / 2] bytes of two codes, the first in the low half.
void unpack_codes(const uint8_t *panels, int64_t out, int64_t in, uint8_t *codes) {
  int64_t lines = in / 8;
  for (int64_t n = 0; n < out; n++)
    for (int64_t v = 0; v < lines; v++) {
      const uint8_t *line = panels + (n / PANEL * lines + v) * 64;
      for (int i = 0; i < 8; i += 2) {
        CodePlace first = code_place((int)(n % PANEL), i), second = code_place((int)(n % PANEL), i + 1);
        int low = line[first.byte] >> first.shift & 15, high = line[second.byte] >> second.shift & 15;
        codes[n * in / 2 + v * 4 + i / 2] = (uint8_t)(low | high << 4);
      }
    }
}

// values [out, groups] of four bytes -> packed [panels, groups, 16].
void pack_groups(const uint32_t *values, int64_t out, int64_t groups, uint32_t *packed) {
  memset(packed, 0, (size_t)((out + PANEL - 1) / PANEL * groups * 64));
  for (int64_t n = 0; n < out; n++)
    for (int64_t g = 0; g < groups; g++)
      packed[(n / PANEL * groups + g) * PANEL + n % PANEL] = values[n * groups + g];
}

// b [rank, out] of elements of 4 / per_unit bytes -> packed [rank * out] in the panels of low_rank.h.
void pack_low_rank(const char *b, int64_t rank, int64_t out, int64_t per_unit, char *packed) {
  size_t size = (size_t)(4 / per_unit);
  for (int64_t first = 0; first < out; first += PANEL) {
    int64_t last = first + PANEL < out ? first + PANEL : out;
    for (int64_t j = 0; j < rank; j += per_unit) {
      int64_t ranks = j + per_unit <= rank ? per_unit : rank - j;
      for (int64_t n = first; n < last; n++)
        for (int64_t i = 0; i < ranks; i++, packed += size)
          memcpy(packed, b + (size_t)((j + i) * out + n) * size, size);
    }
  }
}
