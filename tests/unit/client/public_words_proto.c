#include <stddef.h>

#include "proto/status.h"
#include "proto/words.h"

#ifdef EPD_H
#error "the ground floor must not know the public header"
#endif

#include "tests/unit/client/public_words.h"

#define GROUND_WORD(name) {#name, name},
const struct word ground_words[] = {WORDS(GROUND_WORD){NULL, 0}};
