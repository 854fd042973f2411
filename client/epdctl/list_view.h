/* The lists of the daemon as tables: clients, groups, plans, devices, and the flight recorder. Pure: document
 * in, text out. */
#ifndef EPD_EPDCTL_LIST_VIEW_H
#define EPD_EPDCTL_LIST_VIEW_H

#include <jansson.h>
#include <stdio.h>

void clients_view(const json_t *document, FILE *out);
void groups_view(const json_t *document, FILE *out);
void plans_view(const json_t *document, FILE *out);
void devices_view(const json_t *document, FILE *out);
/* The newest max_ops steps of the flight recorder, oldest first; 0: all. */
void dump_view(const json_t *document, size_t max_ops, FILE *out);

#endif
