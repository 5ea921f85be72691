// The CPU kernels as one translation unit: every template twice, for fp32 and for bf16. Their slow reference
// is adaplex/model/kernels/reference.py and the modules of transformers.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "activations.h"
#include "argmax.h"
#include "checks.h"
#include "code_values.h"
#include "layouts.h"
#include "pack.h"
#include "prefetch.h"
#include "sites.h"
#include "sizes.h"
#include "team.h"
#include "ticket_ranges.h"
#include "types.h"
#include "vectors.h"
#include "workspace.h"

#define ELEMENT float
#define PER_UNIT 1
#define LARGEST 3.4028234663852886e38f
#define NAME(x) f32_##x
#include "element_template.h"
#undef ELEMENT
#undef PER_UNIT
#undef LARGEST
#undef NAME

#define ELEMENT uint16_t
#define PER_UNIT 2
#define LARGEST 3.3895313892515355e38f
#define NAME(x) bf16_##x
#include "element_template.h"
