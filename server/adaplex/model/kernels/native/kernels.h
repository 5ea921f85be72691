// The functions that the library exports; library.py declares them to Python.

#pragma once

#include <stdint.h>

#include "types.h"

// See decoder.h.
int f32_forward(const Model *model, const Step *step);
int bf16_forward(const Model *model, const Step *step);

// See standalone.h.
int f32_linear(const Weight *weight, const float *x, int64_t x_stride, int64_t rows, float *y,
               int64_t y_stride);
int bf16_linear(const Weight *weight, const uint16_t *x, int64_t x_stride, int64_t rows, uint16_t *y,
                int64_t y_stride);
int f32_low_rank(const float *x, int64_t x_stride, int64_t in, float *y, int64_t y_stride, int64_t out,
                 const int64_t *spans, const Site *const *sites, int64_t count);
int bf16_low_rank(const uint16_t *x, int64_t x_stride, int64_t in, uint16_t *y, int64_t y_stride, int64_t out,
                  const int64_t *spans, const Site *const *sites, int64_t count);

// See packing.c.
void pack_dense(const char *weight, int64_t out, int64_t in, int64_t per_unit, char *panels);
void pack_codes(const uint8_t *codes, int64_t out, int64_t in, uint8_t *panels);
void unpack_codes(const uint8_t *panels, int64_t out, int64_t in, uint8_t *codes);
void pack_groups(const uint32_t *values, int64_t out, int64_t groups, uint32_t *packed);
void pack_low_rank(const char *b, int64_t rank, int64_t out, int64_t per_unit, char *packed);

// See team.c.
int team_resize(int threads);
