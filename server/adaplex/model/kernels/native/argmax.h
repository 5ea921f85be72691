// The likeliest token of a row of logits.

#pragma once

#include <math.h>

#include "vectors.h"

// x [n]. Index of the largest value, the first of equals; -1 if the largest is not finite or any is NaN.
static int32_t finite_argmax(const float *x, long n) {
  const VecI32 lane = lane_numbers();
  VecF32 best = splat(-INFINITY);
  VecI32 where = {0}, nan = {0};
  for (long i = 0; i < n; i += VEC_LANES) {
    VecF32 v = f32_load_partial(x + i, n - i);
    VecI32 at = lane + (int32_t)i, more = (v > best) & (at < (int32_t)n);
    best = select_lanes(more, v, best);
    where = (more & at) | (~more & where);
    nan |= v != v;
  }
  float peak = max_lanes(best);
  int32_t first = INT32_MAX, broken = 0;
  for (int i = 0; i < VEC_LANES; i++) {
    if (best[i] == peak && where[i] < first) first = where[i];
    broken |= nan[i];
  }
  return broken || !(peak < INFINITY && peak > -INFINITY) ? -1 : first;
}
