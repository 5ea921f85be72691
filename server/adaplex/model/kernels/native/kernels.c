// The CPU kernels as one translation unit: everything twice, for fp32 and for bf16.
// The slow reference is adaplex/model/kernels/reference.py and transformers' own modules.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "activations.h"
#include "checks.h"
#include "pack.h"
#include "sites.h"
#include "space.h"
#include "team.h"
#include "types.h"
#include "vectors.h"

#define ELEMENT float
#define PER_UNIT 1
#define LARGEST 3.4028234663852886e38f
#define NAME(x) f32_##x
#include "typed.h"
#undef ELEMENT
#undef PER_UNIT
#undef LARGEST
#undef NAME

#define ELEMENT uint16_t
#define PER_UNIT 2
#define LARGEST 3.3895313892515355e38f
#define NAME(x) bf16_##x
#include "typed.h"
