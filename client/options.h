/* Versioned structs of the public header: their first field is the size the caller was compiled with. An
 * older caller's missing tail reads as zero; a newer caller's unknown tail must be zero, for what it asks
 * cannot be given here. */
#ifndef EPD_CLIENT_OPTIONS_H
#define EPD_CLIENT_OPTIONS_H

#include <stddef.h>

#include "proto/status.h"

/* Copies *given (its size_t size first) into *known of known_bytes. EPD_INVALID_ARGUMENT names the struct. */
EPD_MUST_CHECK enum epd_status options_read(void *known, size_t known_bytes, const void *given,
                                            const char *name, struct epd_error *error);
/* The other way, for info structs that the caller declared: fills what both know, zeroes the caller's newer
 * tail and keeps its size. Nothing is written on error. */
EPD_MUST_CHECK enum epd_status options_write(void *given, const void *known, size_t known_bytes,
                                             const char *name, struct epd_error *error);

#endif
