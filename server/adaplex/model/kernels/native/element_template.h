// Included once for each element type, with ELEMENT (its C type), PER_UNIT (elements in four bytes), LARGEST
// (its largest finite value) and NAME(x) (x with the type's prefix) defined.

#include "low_rank.h"
#include "product_task.h"
#include "int4.h"
#include "linear.h"
#include "row_ops.h"
#include "products.h"
#include "attention.h"
#include "bottleneck.h"
#include "residual.h"
#include "decoder.h"
#include "standalone.h"
