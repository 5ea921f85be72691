// Screening of the output layer for steps that want only the likeliest token of each row: a copy of the
// weight W [out, in] in 8 bits, half the bytes of bf16, shows which panels may hold it. The logits of those
// panels, by the weight itself, decide.
//
// W[n] is about scales[n] * code[n], with codes of -127 to 127, and a row x about step * x16, with 16-bit
// integers. So logit n is about scales[n] * step * (x16 . code[n]), whose last factor is an exact integer.
// It differs from the logit that the products of linear.h compute by at most
//   scales[n] * outliers + errors[n] * rest + slack.
// outliers: half the sum of the large |x|, since a code is off by half a scale at most. rest: the norm of the
// other x, by Cauchy and Schwarz. slack: the errors of x16, and the rounding of sums in fp32, for the longest
// row of W.

#pragma once

#include "types.h"

#define SCREENED_PANELS 64  // panels of a row whose logits are computed; beyond them, those of all rows are

// The bound of one row's errors. `slack` is infinite if a row cannot be screened.
typedef struct {
  float step, outliers, rest, slack;
} ScreenedRow;

// The rows of a step, and bounds of their logits in each panel: none is above `upper`, and one is at least
// `lower`.
typedef struct {
  int16_t *x16;          // [rows, stride], zero from `in` on
  ScreenedRow *row;      // [rows]
  float *upper, *lower;  // [rows, panels]
  long rows, stride, panels;
} Screening;

// See int8_head.c.
void screen_panels(const Int8Head *head, long out, const Screening *screening, long first, long last);
