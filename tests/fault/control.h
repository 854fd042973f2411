/* Looks into a daemon through its control socket, as a scraper does. Any thread; nothing is kept. */
#ifndef EPD_TESTS_FAULT_CONTROL_H
#define EPD_TESTS_FAULT_CONTROL_H

#include <jansson.h>

#include "proto/message.h"

/* One verb: the document (json_decref it), or NULL if it was refused or nobody answered within 5 s.
 * elapsed_ms (may be NULL): from connect to the whole document. */
json_t *control_ask(const char *path, enum control_verb verb, double *elapsed_ms);
/* CONTROL_EVICT of one session; 1 if it was done. */
int control_evict(const char *path, uint64_t session_id, const char *reason);
/* The integer at a dotted path of object keys ("sessions.open"); -1 if there is none. */
long long control_number(const json_t *document, const char *path);
/* Sum of an integer over the objects of an array ("devices", "heap_bytes"). */
long long control_sum(const json_t *document, const char *array, const char *key);

#endif
