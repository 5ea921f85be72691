// The CPU kernels for bf16. Their slow reference is adaplex/model/kernels/reference.py and the modules of
// transformers.

#include <stdint.h>

#define ELEMENT uint16_t
#define PER_UNIT 2
#define LARGEST 3.3895313892515355e38f
#define NAME(x) bf16_##x
#include "element_template.h"
