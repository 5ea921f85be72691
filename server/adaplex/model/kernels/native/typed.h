// Included once for each element type, with ELEMENT, PER_UNIT (elements in four bytes), LARGEST (the
// largest finite value) and NAME(x) defined.

#include "low_rank.h"
#include "part.h"
#include "int4.h"
#include "linear.h"
#include "rows.h"
#include "products.h"
#include "attention.h"
#include "bottleneck.h"
#include "residual.h"
#include "decoder.h"
#include "single.h"
