// The layout of every struct of types.h, for Python to compare with structs.py.

#pragma once

#include <stddef.h>

#include "types.h"

// Size and offset in bytes of `Struct.field`; size of `Struct`.
typedef struct {
  const char *name;
  int64_t size, offset;
} FieldLayout;

#define STRUCT(type) {#type, sizeof(type), 0}
#define FIELD(type, field) {#type "." #field, sizeof(((type *)0)->field), offsetof(type, field)}

// Every struct after its fields; ends with a null name.
const FieldLayout struct_layouts[] = {
    FIELD(Site, a),
    FIELD(Site, b),
    FIELD(Site, rank),
    FIELD(Site, bias),
    FIELD(Site, dense),
    FIELD(Site, output_scale),
    FIELD(Site, input_scale),
    FIELD(Site, inner),
    FIELD(Site, shape),
    FIELD(Site, rows),
    FIELD(Site, row_ids),
    FIELD(Site, row_count),
    FIELD(Site, virtual),
    FIELD(Site, virtual_count),
    FIELD(Site, zeros),
    STRUCT(Site),
    FIELD(Weight, panels),
    FIELD(Weight, scales),
    FIELD(Weight, bias),
    FIELD(Weight, in_features),
    FIELD(Weight, out_features),
    FIELD(Weight, group),
    FIELD(Weight, zeros),
    STRUCT(Weight),
    FIELD(Run, start),
    FIELD(Run, stop),
    FIELD(Run, sites),
    STRUCT(Run),
    FIELD(Layer, q),
    FIELD(Layer, k),
    FIELD(Layer, v),
    FIELD(Layer, o),
    FIELD(Layer, gate),
    FIELD(Layer, up),
    FIELD(Layer, down),
    FIELD(Layer, attention_norm),
    FIELD(Layer, mlp_norm),
    FIELD(Layer, q_norm),
    FIELD(Layer, k_norm),
    FIELD(Layer, keys),
    FIELD(Layer, values),
    FIELD(Layer, window),
    FIELD(Layer, modules),
    STRUCT(Layer),
    FIELD(Model, embedding),
    FIELD(Model, final_norm),
    FIELD(Model, cosines),
    FIELD(Model, sines),
    FIELD(Model, layer),
    FIELD(Model, head),
    FIELD(Model, layers),
    FIELD(Model, hidden),
    FIELD(Model, heads),
    FIELD(Model, kv_heads),
    FIELD(Model, head_dim),
    FIELD(Model, middle),
    FIELD(Model, vocabulary),
    FIELD(Model, positions),
    FIELD(Model, blocks),
    FIELD(Model, modules),
    FIELD(Model, embedding_module),
    FIELD(Model, final_norm_module),
    FIELD(Model, head_module),
    FIELD(Model, epsilon),
    FIELD(Model, scale),
    STRUCT(Model),
    FIELD(Step, tokens),
    FIELD(Step, position),
    FIELD(Step, first),
    FIELD(Step, table),
    FIELD(Step, wanted),
    FIELD(Step, run),
    FIELD(Step, head_run),
    FIELD(Step, logits),
    FIELD(Step, likeliest),
    FIELD(Step, rows),
    FIELD(Step, sequences),
    FIELD(Step, width),
    FIELD(Step, wanted_rows),
    FIELD(Step, runs),
    FIELD(Step, head_runs),
    STRUCT(Step),
    {NULL, 0, 0},
};

#undef STRUCT
#undef FIELD
