// The likeliest token of a row of logits.

#pragma once

#include <math.h>

#include "vectors.h"

// x [n]. Index of the largest value, the first of equals; -1 if the largest is not finite or any is NaN.
static int32_t finite_argmax(const float *x, long n) {
  const I32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F32x16 best = splat(-INFINITY);
  I32x16 where = {0}, nan = {0};
  for (long i = 0; i < n; i += LANES) {
    F32x16 v = f32_load_partial(x + i, n - i);
    I32x16 at = lane + (int32_t)i, more = (v > best) & (at < (int32_t)n);
    best = select_lanes(more, v, best);
    where = (more & at) | (~more & where);
    nan |= v != v;
  }
  float peak = max_lanes(best);
  int32_t first = INT32_MAX, broken = 0;
  for (int i = 0; i < LANES; i++) {
    if (best[i] == peak && where[i] < first) first = where[i];
    broken |= nan[i];
  }
  return broken || !(peak < INFINITY && peak > -INFINITY) ? -1 : first;
}
