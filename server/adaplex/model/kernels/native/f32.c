// The CPU kernels for fp32. Their slow reference is adaplex/model/kernels/reference.py and the modules of
// transformers.

#define ELEMENT float
#define PER_UNIT 1
#define LARGEST 3.4028234663852886e38f
#define NAME(x) f32_##x
#include "element_template.h"
