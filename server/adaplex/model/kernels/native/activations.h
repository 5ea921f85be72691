// Activations of MLPs and bottlenecks, lane by lane, and the numbers of the inputs of bottlenecks.

#pragma once

#include "vectors.h"

// Numbered as in structs.py.
enum { IDENTITY, RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, LEAKY_RELU };
enum { READ_OUTPUT, READ_SUM, READ_INPUT, READ_RESIDUAL };

// 1 / (1 + exp(-x)).
INLINE VecF32 sigmoid_lanes(VecF32 x) { return 1.0f / (exp_lanes(-x) + 1.0f); }

// erf(x) within 2e-7: Abramowitz and Stegun, 7.1.26.
INLINE VecF32 erf_lanes(VecF32 x) {
  VecI32 negative = x < (VecF32){0};
  VecF32 size = select_lanes(negative, -x, x), t = 1.0f / (size * 0.3275911f + 1.0f);
  VecF32 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  VecF32 y = 1.0f - p * t * exp_lanes(-size * size);
  return select_lanes(negative, -y, y);
}

// tanh(x): Cephes' polynomial near zero, where the quotient loses digits.
INLINE VecF32 tanh_lanes(VecF32 x) {
  VecF32 z = x * x, p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  VecF32 far = 1.0f - 2.0f / (exp_lanes(x + x) + 1.0f);
  return select_lanes(z < 0.390625f, x + x * z * p, far);
}

// The activation with this number; x for an unknown number.
INLINE VecF32 activate_lanes(VecF32 x, int activation) {
  switch (activation) {
    case RELU: return select_lanes(x < (VecF32){0}, (VecF32){0}, x);
    case GELU: return x * 0.5f * (erf_lanes(x * 0.70710678f) + 1.0f);
    case GELU_TANH: return x * 0.5f * (tanh_lanes((x + x * x * x * 0.044715f) * 0.79788456f) + 1.0f);
    case SILU: return x / (exp_lanes(-x) + 1.0f);
    case TANH: return tanh_lanes(x);
    case SIGMOID: return sigmoid_lanes(x);
    case LEAKY_RELU: return select_lanes(x < (VecF32){0}, x * 0.01f, x);
    default: return x;
  }
}

// x [n]. x = cap * tanh(x / cap), in place; not a number stays that.
static void cap_row(float *x, long n, float cap) {
  for (long i = 0; i < n; i += VEC_LANES) {
    VecF32 capped = tanh_lanes(f32_load_partial(x + i, n - i) * (1.0f / cap)) * cap;
    f32_store_partial(x + i, capped, n - i);
  }
}
