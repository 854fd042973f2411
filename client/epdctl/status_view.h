/* `epdctl status` for people. Pure: document in, text out. */
#ifndef EPD_EPDCTL_STATUS_VIEW_H
#define EPD_EPDCTL_STATUS_VIEW_H

#include <jansson.h>
#include <stdio.h>

/* verbose: the whole configuration as well. */
void status_view(const json_t *status, int verbose, FILE *out);
/* "epd 0.1.0 on host, up 3 min 2 s, 4 sessions, 1 group"; also the first line of other views. */
void status_view_headline(const json_t *document, FILE *out);

#endif
