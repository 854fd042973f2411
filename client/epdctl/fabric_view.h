/* The fabric as tables: nodes, links, and the groups that span them. Pure: document in, text out. */
#ifndef EPD_EPDCTL_FABRIC_VIEW_H
#define EPD_EPDCTL_FABRIC_VIEW_H

#include <jansson.h>
#include <stdio.h>

/* before: an earlier document of the same worker, for bandwidths; NULL: since the groups began. */
void fabric_view(const json_t *document, const json_t *before, FILE *out);

#endif
