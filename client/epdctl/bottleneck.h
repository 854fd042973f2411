/* What holds the node back, read from the stats document: waiting for late ranks, uneven experts, or the work
 * itself. Pure. */
#ifndef EPD_EPDCTL_BOTTLENECK_H
#define EPD_EPDCTL_BOTTLENECK_H

#include <jansson.h>
#include <stdio.h>

/* The rank that has held up its group longest: an object of group["ranks"], NULL if there is none. */
const json_t *bottleneck_late_rank(const json_t *group);
/* A few sentences, the largest reason first; nothing if nothing has run. */
void bottleneck_print(const json_t *stats, FILE *out);

#endif
