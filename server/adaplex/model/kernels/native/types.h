// What Python hands over. Mirrored by structs.py; all integers are 64 bits wide but for arrays of
// tokens, positions and blocks, so that no struct has padding.

#pragma once

#include <stdint.h>

// A frozen weight [out, in] in panels of 16 output columns; see linear.h.
typedef struct {
  const void *panels;
  const float *scales;  // nf4: [panels, in / 64, 16]; int4: see int4.h; null when dense
  const float *bias;    // [out] or null
  int64_t in, out;
  int64_t group;        // int4: inputs that share a scale; 0 when it is none
  const float *zeros;   // int4: instead of those in scales; or null
} Weight;

// What one adapter does at one module; zeros where it does nothing. Elements but for row_ids.
//
// linear: y = output_scale * (W (input_scale * x) + base bias) + b (a (input_scale * x)) + bias
// block:  y += b f(a x + inner) + bias, a bottleneck; `shape` says what x and f are
// norm:   `dense` [features] is its weight, `bias` is added; of a head's norm, to every head
// embedding: `dense` [vocabulary, hidden] is its table; a [vocabulary, rank]; `virtual` are tokens
//            -1, -2, .., and nothing else is done to them
// embedding and output layer: `rows` stand in for the rows of the table or of W that row_ids name;
//            what else is done there is done to them too
typedef struct {
  const void *a;      // [rank, in]
  const void *b;      // [rank, out] in panels; see low_rank.h
  int64_t rank;
  const void *bias;   // [out]
  const void *dense;  // instead of the base's weight; of a linear in panels
  const void *output_scale;  // [out]
  const void *input_scale;   // [in]
  const void *inner;         // [rank]
  int64_t shape;             // activation + 16 * reads; see structs.py
  const void *rows;          // [row_count, features]
  const int32_t *row_ids;    // ascending
  int64_t row_count;
  const void *virtual;       // [virtual_count, hidden]
  int64_t virtual_count;
  const float *zeros;        // of a linear in int4: instead of the base's
} Site;

// Neighbouring rows of one adapter; `sites` has one line a module, null for the base.
typedef struct {
  int64_t start, stop;
  const Site *sites;
} Run;

typedef struct {
  Weight q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm;  // [hidden]
  const float *q_norm, *k_norm;            // [head_dim] or null
  void *keys, *values;                     // [kv_heads, blocks, 16 * head_dim]; see attention.h
  int64_t window;                          // visible keys, 0 for all
  int64_t modules[13];                     // lines of `sites`, as numbered below
} Layer;

enum { Q, K, V, O, GATE, UP, DOWN, ATTENTION_NORM, MLP_NORM, ATTENTION, MLP, Q_NORM, K_NORM };

typedef struct {
  const void *embedding;  // [vocabulary, hidden]
  const float *final_norm;
  const float *cosines, *sines;  // [positions, head_dim / 2]
  const Layer *layer;
  Weight head;
  int64_t layers, hidden, heads, kv_heads, head_dim, middle, vocabulary, positions, blocks, modules;
  int64_t embedding_module, final_norm_module, head_module;
  double epsilon, scale;
} Model;

typedef struct {
  const int32_t *tokens, *position;  // [rows] -1 - i for virtual token i of the row's adapter
  const int32_t *first;              // [sequences + 1] rows of each sequence, neighbours in time
  const int32_t *table;              // [sequences, width] blocks
  const int32_t *wanted;             // [wanted_rows] rows whose logits are asked for
  const Run *run, *head_run;         // over all rows; over the wanted rows
  float *logits;                     // [wanted_rows, vocabulary]
  int32_t *likeliest;                // [wanted_rows] argmax, -1 for a row that is not finite
  int64_t rows, sequences, width, wanted_rows, runs, head_runs;
} Step;

// What a call answers.
enum { DONE = 0, NO_MEMORY = 1, BAD_TOKEN = 2, BAD_POSITION = 3, BAD_BLOCK = 4, BAD_ROWS = 5 };
