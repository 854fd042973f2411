/* Reading the daemon's documents without trusting them: a key that is missing or of another type is "not
 * known", never a crash, so that an epdctl and a daemon of different versions still talk. Any thread. */
#ifndef EPD_EPDCTL_FIELD_H
#define EPD_EPDCTL_FIELD_H

#include <jansson.h>

/* The number, or NaN. A boolean counts as 0 or 1. */
double field_number(const json_t *object, const char *key);
/* The number of an object in the object: field_number(object[key], inner). */
double field_number_in(const json_t *object, const char *key, const char *inner);
/* What the number has grown by since the earlier object; all of it if before is NULL or lacks it, NaN if now does. */
double field_growth(const json_t *now, const json_t *before, const char *key);
/* The text, or fallback. Borrowed from the document. */
const char *field_text(const json_t *object, const char *key, const char *fallback);
/* 1 if it is there and true (or not zero). */
int field_true(const json_t *object, const char *key);
/* The array or object, or NULL; json_array_foreach and json_object_foreach take NULL as empty. */
json_t *field_array(const json_t *object, const char *key);
json_t *field_object(const json_t *object, const char *key);
/* Any scalar as text: "-" if missing or empty, yes and no for booleans. text has room for bytes. Returns
 * text. */
const char *field_print(const json_t *object, const char *key, char *text, size_t bytes);

#endif
