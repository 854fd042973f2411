/* `epdctl stats` on one screen: what the node does, how fast, and what holds it back. Pure: documents in,
 * text out. */
#ifndef EPD_EPDCTL_STATS_VIEW_H
#define EPD_EPDCTL_STATS_VIEW_H

#include <jansson.h>
#include <stdio.h>

/* before: an earlier document of the same worker, for rates between the two (watch); NULL: totals and
 * averages since the start. */
void stats_view(const json_t *stats, const json_t *before, FILE *out);

#endif
