// Included by the translation unit of each element type, with ELEMENT (its C type), PER_UNIT (elements in
// four bytes), LARGEST (its largest finite value) and NAME(x) (x with the type's prefix) defined.
//
// Weights, adapters, keys and values are elements. ACTIVATION is the type of what goes from product to
// product: bf16 where the processor multiplies bf16, fp32 elsewhere, so that no product widens it again.
// ACT(x), UNIT(x) and CODE(x) are x for activations, for units of weights, and for units of decoded codes.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "activations.h"
#include "argmax.h"
#include "checks.h"
#include "code_values.h"
#include "decoded.h"
#include "group_scale.h"
#include "integers.h"
#include "int8_head.h"
#include "kernels.h"
#include "prefetch.h"
#include "sites.h"
#include "sizes.h"
#include "team.h"
#include "ticket_ranges.h"
#include "types.h"
#include "units.h"
#include "vectors.h"
#include "workspace.h"

#define SINGLE(x) single_##x
#define PAIR(x) pair_##x
#define NATIVE(x) native_##x
#define F32(x) f32_##x
#define BF16(x) bf16_##x

#if PER_UNIT == 1
#define ACTIVATION float
#define ACT F32
#define UNIT SINGLE
#define CODE PAIR
#elif defined(NATIVE_BF16)
#define ACTIVATION uint16_t
#define ACT BF16
#define UNIT NATIVE
#define CODE NATIVE
#else
#define ACTIVATION float
#define ACT F32
#define UNIT PAIR
#define CODE PAIR
#endif

#include "low_rank.h"
#include "product_task.h"
#include "linear.h"
#include "adapter_tiles.h"
#include "product_tile.h"
#include "multiply.h"
#include "row_ops.h"
#include "quantize.h"
#include "products.h"
#include "attention.h"
#include "bottleneck.h"
#include "residual.h"
#include "likeliest.h"
#include "decoder.h"
#include "standalone.h"
