/* The text to learn and the batches taken from it. A batch is a pure function of (seed, step, rank). */
#ifndef TRAIN_MOE_TEXT_H
#define TRAIN_MOE_TEXT_H

#include <stddef.h>

#include "settings.h"
#include <epd.h>

struct text {
    unsigned char *bytes; /* owned */
    size_t n_bytes;
};

struct batch {
    unsigned char *context; /* owned, [n_tokens, context_bytes], the nearest byte first */
    unsigned char *target;  /* owned, [n_tokens] the byte that follows */
};

/* Reads the whole file; a text shorter than a context and one byte is refused. Errors have been printed. */
enum epd_status text_open(struct text *text, const struct settings *settings);
void text_close(struct text *text);

enum epd_status batch_init(struct batch *batch, const struct settings *settings);
void batch_fini(struct batch *batch);
/* Takes the positions of this step and rank. */
void batch_take(struct batch *batch, const struct text *text, const struct settings *settings, uint32_t step,
                uint32_t rank);

#endif
