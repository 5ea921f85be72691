// The structs that Python passes, mirrored by structs.py; layouts.h lists their fields, and Python compares
// them with its own when it loads the library. Integers are 64 bits wide except in arrays of tokens,
// positions and blocks, so that no struct has padding.

#pragma once

#include <stdint.h>

// A frozen weight [out, in] in panels of 16 output columns; see linear.h.
typedef struct {
  const void *panels;
  const float *scales;  // nf4: [panels, in / 64, 16]; int4: pairs, see linear.h; null if dense
  const float *bias;    // [out] or null
  int64_t in_features, out_features;
  int64_t group;       // int4: inputs that share a scale; 0 for other formats
  const float *zeros;  // int4: [panels, in / group, 16], replacing the zeros in `scales`; or null
  int64_t int8_inputs;  // 1 if codes are multiplied by activations of 8 bits; see integers.h
} Weight;

// A copy of the output layer's weight [out, in] in 8 bits; see int8_head.h. Without one, `panels` is null.
typedef struct {
  const int8_t *panels;  // [panels, lines, 2, 16, 2]: lines of four inputs, rounded up
  const float *scales;   // [panels, 16]: an element is about scale * code
  const float *errors;   // [panels, 16]: at least the norm of a row's difference from scale * code
  double longest;        // at least the norm of any row, and of any row's scale * code
} Int8Head;

// The changes of one adapter at one module; zero where it has none. Pointers are to elements unless they have
// another type.
//
// linear: y = output_scale * (W (input_scale * x) + base bias) + b (a (input_scale * x)) + bias
// block: y += b f(a x + inner) + bias, a bottleneck; `shape` encodes f and the input x
// norm: `dense` [features] replaces the weight, `bias` is added; for a norm of heads, to every head
// embedding: `dense` [vocabulary, hidden] replaces the table; a is [vocabulary, rank]; `virtual` are the
//            embeddings of tokens -1, -2, ..., to which no other change applies
// embedding and output layer: `rows` replace the rows of the table or of W that row_ids lists; other changes
//            apply to them too
typedef struct {
  const void *a;  // [rank, in]
  const void *b;  // [rank, out] in panels; see low_rank.h
  int64_t rank;
  const void *bias;          // [out]
  const void *dense;         // replaces the base's weight; for a linear in panels
  const void *output_scale;  // [out]
  const void *input_scale;   // [in]
  const void *inner;         // [rank]
  int64_t shape;             // activation + 16 * reads; see structs.py
  const void *rows;          // [row_count, features]
  const int32_t *row_ids;    // [row_count], ascending
  int64_t row_count;
  const void *virtual;  // [virtual_count, hidden]
  int64_t virtual_count;
  const float *zeros;  // int4 linear: [panels, in / group, 16], replacing the base's zeros
} Site;

// Rows [start, stop) of one adapter.
typedef struct {
  int64_t start, stop;
  const Site *sites;  // [modules]; null for the base
} Run;

// A linear of the base, and the number of its module, an index into Run.sites.
typedef struct {
  Weight weight;
  int64_t module;
} Linear;

// A norm of the base: y = (x - mean) / sqrt(variance + epsilon) * weight + bias. An RMSNorm has no mean: it
// counts as zero. A norm that a layer lacks has no weight.
typedef struct {
  const float *weight;  // [features], `offset` included
  const float *bias;    // [features] or null
  int64_t module;       // an index into Run.sites; -1 if adapters cannot change the norm
  int64_t centered;     // 1 for a LayerNorm, 0 for an RMSNorm
  double epsilon;
  double offset;  // of the weight that an adapter puts in place of the base's
} Norm;

// One decoder layer: residual += attention_out_norm(attention(attention_norm(residual))), then likewise for
// the MLP. Norms of one head have [head_dim] features, the others [hidden].
typedef struct {
  Linear qkv[3];      // [qkv_count]: q, k and v, or one whose outputs are q | k | v
  Linear gate_up[2];  // [gate_up_count]: gate and up, or one whose outputs are gate | up; up if not gated
  Linear out, down;
  int64_t qkv_count, gate_up_count;
  Norm attention_norm, q_norm, k_norm, attention_out_norm, mlp_norm, mlp_out_norm;
  int64_t attention_module, mlp_module;  // indices into Run.sites; -1 if no bottleneck fits the block
  void *keys, *values;                   // [kv_heads, blocks, 16 * head_dim]; see attention.h
  const float *cosines, *sines;          // [positions, rotary_dim / 2]
  int64_t window;                        // visible keys, 0 for all
  double scale, softcap;                 // score = softcap * tanh(scale * q k / softcap); scale * q k if 0
} Layer;

// A decoder.
typedef struct {
  const void *embedding;           // [vocabulary, hidden]
  const void *position_embedding;  // [positions, hidden], added to the embeddings of tokens; or null
  const Layer *layer;              // [layers]
  Norm final_norm;
  Weight head;
  Int8Head int8_head;
  int64_t layers, hidden, heads, kv_heads, head_dim, middle, vocabulary, positions, blocks, modules;
  int64_t rotary_dim;         // dimensions of a head that positions rotate, the first ones
  int64_t activation, gated;  // of MLPs: numbered as in activations.h; 1 if it multiplies up
  int64_t embedding_module, head_module;
  double embedding_scale;  // factor of the embeddings of tokens
  double logit_softcap;    // logit = logit_softcap * tanh(logit / logit_softcap); 0 for none
} Model;

// The rows of one step, and where its results go.
typedef struct {
  const int32_t *tokens;      // [rows]; -1 - i is virtual token i of the row's adapter
  const int32_t *position;    // [rows]
  const int32_t *first;       // [sequences + 1]: rows [first[s], first[s + 1]) are consecutive positions
                              // of sequence s
  const int32_t *table;       // [sequences, width] blocks
  const int32_t *wanted;      // [wanted_rows]: rows to compute logits of
  const Run *run, *head_run;  // [runs] over all rows; [head_runs] over the wanted rows
  float *logits;              // [wanted_rows, vocabulary]
  int32_t *likeliest;         // [wanted_rows]: argmax of the logits, -1 for a row that is not finite
  int64_t rows, sequences, width, wanted_rows, runs, head_runs;
  int64_t only_likeliest;  // 1 if `logits` may be left undefined
} Step;

// Return codes of the library's functions.
enum { DONE = 0, NO_MEMORY = 1, BAD_TOKEN = 2, BAD_POSITION = 3, BAD_BLOCK = 4, BAD_ROWS = 5 };
