/* The calling thread's error: what epd_error_text() shows. Every public call starts by clearing it and passes
 * the pointer down as the struct epd_error of proto/status.h. One per thread, owned by the library. */
#ifndef EPD_CLIENT_ERROR_H
#define EPD_CLIENT_ERROR_H

#include "proto/status.h"

/* Cleared: EPD_OK and "". */
struct epd_error *error_begin(void);

#endif
