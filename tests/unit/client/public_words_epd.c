/* As a user's file: nothing of the tree but the public header, in C99. */
#include "client/epd.h"

#ifdef EPD_PROTO_STATUS_H
#error "the public header must stand alone"
#endif

#include "tests/unit/client/public_words.h"

#define PUBLIC_WORD(name) {#name, name},
const struct word public_words[] = {WORDS(PUBLIC_WORD){0, 0}};
