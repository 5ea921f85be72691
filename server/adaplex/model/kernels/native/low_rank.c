// Grouped low-rank deltas on the CPU: every adapter of a step at one module in one call.
// The slow reference is adaplex/model/kernels/reference.py, add_low_rank.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define ROW_BLOCK 4

// GCC's vectors become AVX-512, AVX2 or plain instructions, whichever the processor has.
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

static inline vec load_f32(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline void store_f32(float *p, vec v) { memcpy(p, &v, sizeof v); }

static inline vec load_bf16(const uint16_t *p) {
  halves h;
  memcpy(&h, p, sizeof h);
  words w = __builtin_convertvector(h, words) << 16;
  vec v;
  memcpy(&v, &w, sizeof v);
  return v;
}

// Rounds to nearest, ties to even; a NaN stays one.
static inline void store_bf16(uint16_t *p, vec v) {
  words w;
  memcpy(&w, &v, sizeof w);
  words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  words nan = (words)(v != v);
  words kept = (rounded & ~nan) | (((w >> 16) | 0x40) & nan);
  halves h = __builtin_convertvector(kept, halves);
  memcpy(p, &h, sizeof h);
}

static inline float sum_lanes(vec v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

static inline float f32_widen(float x) { return x; }
static inline float f32_narrow(float x) { return x; }

static inline float bf16_widen(uint16_t x) {
  uint32_t w = (uint32_t)x << 16;
  float f;
  memcpy(&f, &w, sizeof f);
  return f;
}

static inline uint16_t bf16_narrow(float x) {
  uint32_t w;
  memcpy(&w, &x, sizeof w);
  if (x != x) return (uint16_t)((w >> 16) | 0x40);
  return (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

#define ELEMENT float
#define LOAD load_f32
#define STORE store_f32
#define NAME(x) f32_##x
#include "low_rank_rows.h"
#undef ELEMENT
#undef LOAD
#undef STORE
#undef NAME

#define ELEMENT uint16_t
#define LOAD load_bf16
#define STORE store_bf16
#define NAME(x) bf16_##x
#include "low_rank_rows.h"
