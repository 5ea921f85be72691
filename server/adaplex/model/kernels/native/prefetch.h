// What to prefetch while a tile of a product multiplies. Base products are compute-bound and adapter products
// memory-bound, so prefetching overlaps them.

#pragma once

#include "vectors.h"

#define PIECE_LINES 16  // cache lines of one piece of a PrefetchPlan

// The `a` of the products after the current ones: for rows [row, stop), which are the thread's share, and
// modules module[0 .. modules), whose `a` are neighbours in memory.
typedef struct {
  long modules, in_features, module[3];
  long row, stop;
  long tiles;  // tiles of the current products that share the prefetch of one row
  long tile;   // number of the thread's next tile
} NextProduct;

// The prefetches of one tile. piece [8]: addresses of PIECE_LINES cache lines each, of the panels of `b` that
// the tile reads at its end; piece i belongs to row i % rows. next_a: the tile's share of NextProduct, of
// which `next_bytes` are prefetched for each eight inputs.
typedef struct {
  const char *piece[8];
  const char *next_a;
  long next_bytes;
} PrefetchPlan;

// Prefetches the share of a plan that belongs to the eight inputs of one line.
INLINE void prefetch_share(const PrefetchPlan *plan, long line) {
  const char *at = plan->piece[line / 8 % 8] + line % 8 * 128;
  prefetch(at);
  prefetch(at + 64);
  const char *from = plan->next_a + line * plan->next_bytes;
  for (at = from; at < from + plan->next_bytes; at += 64) prefetch_later(at);
}

// Block `index` of `count` blocks of rows that are multiplied by the same panels, one after another. Each
// prefetches its share of the next panels, so that prefetching is spread over all of them.
typedef struct {
  long index, count;
} RowBlock;

// panels [lines] cache lines of 64 bytes. The start of a block's share of them.
INLINE const char *share_start(const char *panels, long lines, RowBlock row_block) {
  return panels + lines * 64 * row_block.index / row_block.count;
}

// Bytes between the prefetches of a block.
INLINE long share_stride(RowBlock row_block) { return (64 + row_block.count - 1) / row_block.count; }
