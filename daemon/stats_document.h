/* The statistics as JSON: what `epdctl stats` shows and exporters read. Loop thread. The schema is in
 * control.h. */
#ifndef EPD_DAEMON_STATS_DOCUMENT_H
#define EPD_DAEMON_STATS_DOCUMENT_H

#include <jansson.h>

#include "daemon/worker.h"

struct session;

/* Adds every part of the stats document that the session may see: a rank is told of the groups of its uid only, and of the
 * load of single experts only where it is a member. */
void stats_fill_document(const struct session *session, json_t *document);
/* {limit name: how often it refused something}. */
json_t *stats_limits_document(const struct worker *worker);
/* [{device_idx, uuid, name, ...}]. */
json_t *stats_devices_document(const struct worker *worker);

#endif
