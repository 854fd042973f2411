/* The public header as the library's own files see it: with the ground floor's words, which it otherwise
 * repeats. */
#ifndef EPD_CLIENT_PUBLIC_H
#define EPD_CLIENT_PUBLIC_H

#include "proto/status.h"
#include "proto/words.h"

/* After the words: it leaves its own copies out when they are there. */
#include "client/epd.h"

#endif
