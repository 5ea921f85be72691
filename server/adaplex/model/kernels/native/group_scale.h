// The scales of groups of codes; see linear.h.

#pragma once

#include "types.h"
#include "vectors.h"

#define NF4_GROUP 64  // inputs of an nf4 weight that share a scale

// The scale and zero of one group of inputs in the columns of a vector; nf4 has no zero.
typedef struct {
  VecF32 scale, zero;
} GroupScale;

// The scale of a group in vector `vec` of a panel's columns; place: panel * groups + group. own_zeros
// [panels, groups, 16] as in code_tile.
INLINE GroupScale group_scale(const Weight *weight, const int nf4, const float *own_zeros, long place,
                              int vec) {
  long at = place * PANEL + vec * VEC_LANES;
  if (nf4) return (GroupScale){f32_load(weight->scales + at), (VecF32){0}};
  VecU32 pair = load_words(weight->scales + at);
  VecF32 zero = own_zeros ? f32_load(own_zeros + at) : (VecF32)(pair & 0xffff0000u);
  return (GroupScale){(VecF32)(pair << 16), zero};
}

// acc + the product of one group: sum of code * x, and minus the sum of x.
INLINE VecF32 add_group(VecF32 acc, VecF32 sum, GroupScale scale, const int nf4, float minus_sum) {
  if (!nf4) sum += scale.zero * minus_sum;
  return acc + sum * scale.scale;
}
