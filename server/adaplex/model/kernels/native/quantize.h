// Included once for each element type: quantization of activations for integers.h.

#define LEAST_MAXIMUM 1e-30f  // blocks of smaller values are zeros
#define BLOCK_VECS (QUANTIZED_BLOCK / VEC_LANES)

// values [VEC_LANES] integers of -127 to 127 -> to [VEC_LANES]. Wide lines hold inputs 0 4 1 5 of their eight
// in low halves of bytes and 2 6 3 7 in high ones; narrow lines are decoded in order.
INLINE void NAME(store_quantized)(VecI32 values, int8_t *to) {
#if WIDE_LINES
  values = __builtin_shuffle(values, (VecI32){0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15});
#endif
  typedef int8_t VecI8 __attribute__((vector_size(VEC_LANES)));
  VecI8 bytes = __builtin_convertvector(values, VecI8);
  memcpy(to, &bytes, sizeof bytes);
}

// x [in], in whole blocks, to row `row` of `rows`. A block that is not finite has NaN as its scale.
static void NAME(quantize_row)(const ACTIVATION *x, long in, QuantizedRows rows, long row) {
  const QuantizedRows to = quantized_from(rows, row, in);
  for (long b = 0; b < in / QUANTIZED_BLOCK; b++) {
    VecF32 v[BLOCK_VECS], largest = {0}, zeros = {0}, sum = {0};
    UNROLL for (int i = 0; i < BLOCK_VECS; i++) {
      v[i] = ACT(load)(x + b * QUANTIZED_BLOCK + i * VEC_LANES);
      VecF32 size = (VecF32)((VecU32)v[i] & 0x7fffffffu);
      largest = select_lanes(size > largest, size, largest);
      zeros += v[i] * 0.0f;
    }
    const float most = max_lanes(largest);
    const float inverse = most > LEAST_MAXIMUM ? INT8_LARGEST / most : 0;
    UNROLL for (int i = 0; i < BLOCK_VECS; i++) {
      VecI32 values = round_lanes(v[i] * inverse);
      sum += __builtin_convertvector(values, VecF32);
      NAME(store_quantized)(values, to.values + b * QUANTIZED_BLOCK + i * VEC_LANES);
    }
    to.scales[b] = most / INT8_LARGEST + sum_lanes(zeros);
    to.minus_sums[b] = to.scales[b] == to.scales[b] ? -sum_lanes(sum) : 0;
  }
}
#undef LEAST_MAXIMUM
#undef BLOCK_VECS
