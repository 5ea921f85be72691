// Ranges of the tickets of a round: each range is the work on some rows of one product.

#pragma once

#include "sites.h"

// Tickets from `first_ticket` to that of the next range: rows [start, stop) of product number `product` of a
// phase, multiplied by the weight of `own`, or by the base's weight if it is null.
typedef struct {
  int product;
  long start, stop;
  const Site *own;
  long first_ticket;
} TicketRange;

// ranges [n + 1]; the last only marks the end. The range of a ticket; `current` is that of the thread's
// previous ticket, from which the search starts.
static const TicketRange *range_of_ticket(const TicketRange *ranges, const TicketRange *current,
                                          long ticket) {
  if (ticket < current->first_ticket) current = ranges;
  while (ticket >= current[1].first_ticket) current++;
  return current;
}

// range [count + 1], module [modules], runs [count]. Makes a range of each run that has a rank at one of the
// modules, with a ticket for each `rows` rows; returns the number of tickets.
static long rank_ranges(TicketRange *range, const long *module, long modules, const Run *runs, long count,
                        long rows) {
  long tickets = 0;
  for (long r = 0; r < count; r++) {
    if (!runs[r].sites || !has_rank(runs[r].sites, module, modules)) continue;
    *range++ = (TicketRange){0, runs[r].start, runs[r].stop, NULL, tickets};
    tickets += (runs[r].stop - runs[r].start + rows - 1) / rows;
  }
  *range = (TicketRange){.first_ticket = tickets};
  return tickets;
}
