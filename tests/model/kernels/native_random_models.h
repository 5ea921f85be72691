// Random models and adapters of odd shapes, in buffers of exactly their size.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "vectors.h"

enum { BLOCKS = 17, POSITIONS = 64 };

typedef struct {
  size_t element;  // 4 or 2 bytes
  long layers, hidden, heads, kv_heads, head_dim, middle, vocabulary, window;
  int group, head_norms, biased;  // group: 0 for dense weights, 1 for nf4, else inputs of an int4 group
  int kind;                       // of a decoder
} Shape;

// Kinds of decoders: llama's; Gemma's, with norms after blocks, soft caps and scaled embeddings; phi-3's,
// with fused linears and partial rotations; gpt2's, with LayerNorms, a table of positions and no gate.
enum { LLAMA, GEMMA, PHI, GPT };

static void *allocated[4096];
static long allocations;
static uint64_t state = 88172645463325252u;

// A random number of [0, below); xorshift.
static long random_below(long below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (long)(state >> 33) % below;
}

// Memory that free_all frees.
static void *allocate(size_t bytes) {
  if (allocations == sizeof allocated / sizeof *allocated) abort();
  return allocated[allocations++] = malloc(bytes);
}

static void free_all(void) {
  while (allocations) free(allocated[--allocations]);
}

// [count] random elements of `size` bytes in [-0.25, 0.25].
static void *elements(size_t size, long count) {
  char *made = allocate(size * (size_t)count);
  for (long i = 0; i < count; i++) {
    float value = (float)(random_below(2001) - 1000) / 4000;
    uint16_t narrow = bf16_narrow(value);
    memcpy(made + size * (size_t)i, size == 4 ? (void *)&value : (void *)&narrow, size);
  }
  return made;
}

// A random weight [out, in] in dense panels.
static void *dense_panels(const Shape *s, long in, long out) {
  long per_unit = s->element == 4 ? 1 : 2;
  char *panels = allocate((size_t)((out + PANEL - 1) / PANEL * (in / per_unit) * 64));
  pack_dense(elements(s->element, out * in), out, in, per_unit, panels);
  return panels;
}

// Random group values [out, count] of four bytes, packed; of `size` bytes an element.
static float *groups(size_t size, long count, long out) {
  float *packed = allocate(sizeof(float) * (size_t)((out + PANEL - 1) / PANEL * count * PANEL));
  pack_groups(elements(size, out * count * (4 / (long)size)), out, count, (uint32_t *)packed);
  return packed;
}

// A random weight [out, in]; dense if its width does not divide into groups.
static Weight weight(const Shape *s, long in, long out, int group) {
  Weight w = {.in_features = in, .out_features = out, .bias = s->biased ? elements(4, out) : NULL};
  long each = group == 1 ? 64 : group;
  if (!group || in % each) {
    w.panels = dense_panels(s, in, out);
    return w;
  }
  long panels = (out + PANEL - 1) / PANEL;
  uint8_t *codes = allocate((size_t)(out * in / 2));
  for (long i = 0; i < out * in / 2; i++) codes[i] = (uint8_t)random_below(256);
  void *packed = allocate((size_t)(panels * in / 8 * 64));
  pack_codes(codes, out, in, packed);
  w.panels = packed;
  w.scales = groups(group == 1 ? 4 : 2, in / each, out);
  if (group > 1) w.group = group;
  w.int8_inputs = each % 32 == 0 && random_below(2);
  return w;
}

// A random linear [out, in], and the next number of a module.
static Linear linear(const Shape *s, long in, long out, long *modules) {
  return (Linear){weight(s, in, out, s->group), (*modules)++};
}

// A random norm with the next number of a module; without a weight unless `exists`.
static Norm norm(const Shape *s, long features, int exists, long *modules) {
  if (!exists) return (Norm){.module = -1};
  return (Norm){.weight = elements(4, features),
                .bias = s->kind == GPT ? elements(4, features) : NULL,
                .module = (*modules)++,
                .centered = s->kind == GPT,
                .epsilon = 1e-5,
                .offset = s->kind == GEMMA};
}

// Element i of an array of a shape's elements.
static float element_at(const Shape *s, const void *array, long i) {
  return s->element == 4 ? ((const float *)array)[i] : bf16_widen(((const uint16_t *)array)[i]);
}

// elements [out, in] -> their 8-bit copy.
static Int8Head int8_head(const Shape *s, const void *weight, long in, long out) {
  long lines = (in + 3) / 4, columns = (out + PANEL - 1) / PANEL * PANEL;
  size_t size = (size_t)(columns * lines * 4), each = sizeof(float) * (size_t)columns;
  int8_t *panels = memset(allocate(size), 0, size);
  float *scales = allocate(each), *errors = allocate(each);
  double longest = 0;
  for (long n = 0; n < columns; n++) {
    float row[256] = {0}, peak = 0;
    double norm = 0, error = 0;
    for (long i = 0; n < out && i < in; i++) {
      row[i] = element_at(s, weight, n * in + i);
      peak = fabsf(row[i]) > peak ? fabsf(row[i]) : peak;
    }
    scales[n] = peak / 127;
    for (long i = 0; peak > 0 && i < in; i++) {
      float code = roundf(row[i] / scales[n]);
      panels[((n / PANEL * lines + i / 4) * 2 + i % 4 / 2) * 32 + n % PANEL * 2 + i % 2] = (int8_t)code;
      norm += row[i] * row[i];
      error += (row[i] - code * scales[n]) * (row[i] - code * scales[n]);
    }
    errors[n] = (float)(1.001 * sqrt(error));
    if (norm > longest) longest = norm;
  }
  return (Int8Head){panels, scales, errors, 1.1 * sqrt(longest)};
}

// A random model of a shape.
static Model model_of(const Shape *s) {
  long q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim, h = s->hidden, mid = s->middle;
  long rotary = s->kind == GPT ? 0 : s->kind == PHI ? s->head_dim / 4 * 2 : s->head_dim, modules = 2;
  int gemma = s->kind == GEMMA, fused = s->kind == PHI || s->kind == GPT, gated = s->kind != GPT;
  Layer *layers = allocate(sizeof(Layer) * (size_t)s->layers);
  for (long i = 0; i < s->layers; i++) {
    size_t cache = s->element * (size_t)(kv * BLOCKS * PANEL);
    Layer l = {
        .qkv = {linear(s, h, fused ? q + 2 * kv : q, &modules)},
        .gate_up = {linear(s, h, fused && gated ? 2 * mid : mid, &modules)},
        .out = linear(s, q, h, &modules),
        .down = linear(s, mid, h, &modules),
        .qkv_count = fused ? 1 : 3,
        .gate_up_count = fused ? 1 : 2,
        .attention_norm = norm(s, h, 1, &modules),
        .q_norm = norm(s, s->head_dim, s->head_norms, &modules),
        .k_norm = norm(s, s->head_dim, s->head_norms, &modules),
        .attention_out_norm = norm(s, h, gemma, &modules),
        .mlp_norm = norm(s, h, 1, &modules),
        .mlp_out_norm = norm(s, h, gemma, &modules),
        .attention_module = s->kind == LLAMA ? modules++ : -1,
        .mlp_module = s->kind == LLAMA ? modules++ : -1,
        .keys = memset(allocate(cache), 0, cache),
        .values = memset(allocate(cache), 0, cache),
        .cosines = rotary ? elements(4, POSITIONS * rotary / 2) : NULL,
        .sines = rotary ? elements(4, POSITIONS * rotary / 2) : NULL,
        .window = s->window,
        .scale = 0.25,
        .softcap = gemma ? 5 : 0,
    };
    for (int j = 1; j < l.qkv_count; j++) l.qkv[j] = linear(s, h, kv, &modules);
    for (int j = 1; j < l.gate_up_count; j++) l.gate_up[j] = linear(s, h, mid, &modules);
    layers[i] = l;
  }
  Norm last = norm(s, h, 1, &modules);
  long per_unit = s->element == 4 ? 1 : 2;
  void *head = elements(s->element, s->vocabulary * h);
  void *panels = allocate((size_t)((s->vocabulary + PANEL - 1) / PANEL * (h / per_unit) * 64));
  pack_dense(head, s->vocabulary, h, per_unit, panels);
  return (Model){
      .embedding = elements(s->element, s->vocabulary * h),
      .position_embedding = s->kind == GPT ? elements(s->element, POSITIONS * h) : NULL,
      .layer = layers,
      .final_norm = last,
      .head = {.panels = panels,
               .bias = s->biased ? elements(4, s->vocabulary) : NULL,
               .in_features = h,
               .out_features = s->vocabulary},
      .int8_head = s->biased ? (Int8Head){0} : int8_head(s, head, h, s->vocabulary),
      .layers = s->layers,
      .hidden = h,
      .heads = s->heads,
      .kv_heads = s->kv_heads,
      .head_dim = s->head_dim,
      .middle = mid,
      .vocabulary = s->vocabulary,
      .positions = POSITIONS,
      .blocks = BLOCKS,
      .modules = modules,
      .rotary_dim = rotary,
      .activation = 3 + s->kind % 2,  // SILU or GELU_TANH
      .gated = gated,
      .embedding_module = 0,
      .head_module = 1,
      .embedding_scale = gemma ? 6 : 1,
      .logit_softcap = gemma ? 7 : 0,
  };
}

// [count] random elements in one of three calls, else null.
static void *maybe(const Shape *s, long count) {
  return random_below(3) ? NULL : elements(s->element, count);
}

// A pair a [rank, in], b [rank, out] of a random rank, which is returned.
static long low_rank(const Shape *s, Site *site, long in, long out) {
  static const long ranks[] = {0, 1, 3, 5, 8};
  long rank = ranks[random_below(5)];
  if (!rank) return 0;
  site->a = elements(s->element, rank * in);
  site->b = elements(s->element, rank * out);
  return site->rank = rank;
}

// Replaces three rows of a table [rows, features], the first and the last among them.
static void replace_some(const Shape *s, Site *site, long rows, long features) {
  int32_t ids[] = {0, (int32_t)(rows / 3), (int32_t)(rows - 1)};
  site->row_count = 3;
  site->row_ids = memcpy(allocate(sizeof ids), ids, sizeof ids);
  site->rows = elements(s->element, 3 * features);
}

static void at_weight(const Shape *s, Site *site, const Weight *w, int merged) {
  if (merged && w->group && random_below(2))
    site->zeros = groups(4, w->in_features / w->group, w->out_features);
  else if (merged && random_below(2))
    site->dense = dense_panels(s, w->in_features, w->out_features);
  if (!merged) low_rank(s, site, w->in_features, w->out_features);
  site->output_scale = maybe(s, w->out_features);
  site->input_scale = maybe(s, w->in_features);
  site->bias = maybe(s, w->out_features);
}

static void at_linear(const Shape *s, Site *sites, const Linear *l, int merged) {
  at_weight(s, sites + l->module, &l->weight, merged);
}

static void at_norm(const Shape *s, Site *sites, const Norm *norm, long features) {
  if (norm->module < 0) return;
  sites[norm->module].dense = maybe(s, features);
  sites[norm->module].bias = maybe(s, features);
}

static void at_block(const Shape *s, Site *site, long hidden) {
  long width = low_rank(s, site, hidden, hidden);
  if (!width) return;
  site->inner = maybe(s, width);
  site->bias = maybe(s, hidden);
  site->shape = random_below(8) + 16 * random_below(4);
}

static void at_embedding(const Shape *s, Site *site, long vocabulary, long hidden) {
  low_rank(s, site, vocabulary, hidden);
  site->dense = maybe(s, vocabulary * hidden);
  if (random_below(2)) replace_some(s, site, vocabulary, hidden);
  site->virtual_count = random_below(4);
  if (site->virtual_count) site->virtual = elements(s->element, site->virtual_count * hidden);
}

// Random sites [modules]; if `merged`, linears have their own weights instead of a low-rank delta.
static Site *adapter(const Shape *s, const Model *m, int merged) {
  Site *sites = allocate(sizeof(Site) * (size_t)m->modules);
  memset(sites, 0, sizeof(Site) * (size_t)m->modules);
  at_embedding(s, sites + m->embedding_module, m->vocabulary, m->hidden);
  at_norm(s, sites, &m->final_norm, m->hidden);
  at_weight(s, sites + m->head_module, &m->head, merged);
  if (random_below(2)) replace_some(s, sites + m->head_module, m->vocabulary, m->hidden);
  for (const Layer *l = m->layer; l < m->layer + m->layers; l++) {
    for (int i = 0; i < l->qkv_count; i++) at_linear(s, sites, l->qkv + i, merged);
    for (int i = 0; i < l->gate_up_count; i++) at_linear(s, sites, l->gate_up + i, merged);
    at_linear(s, sites, &l->out, merged);
    at_linear(s, sites, &l->down, merged);
    const Norm *norms[] = {&l->attention_norm, &l->attention_out_norm, &l->mlp_norm, &l->mlp_out_norm};
    for (int i = 0; i < 4; i++) at_norm(s, sites, norms[i], m->hidden);
    at_norm(s, sites, &l->q_norm, m->head_dim);
    at_norm(s, sites, &l->k_norm, m->head_dim);
    if (l->attention_module >= 0) at_block(s, sites + l->attention_module, m->hidden);
    if (l->mlp_module >= 0) at_block(s, sites + l->mlp_module, m->hidden);
  }
  return sites;
}
