/* One message of every kind, with every field set to a value of its own, so that a lost or swapped field
 * shows. The golden datagrams are these messages; the round-trip tests use the extremes too. Caller owns the
 * sample. */
#ifndef EPD_TESTS_GOLDEN_SAMPLES_H
#define EPD_TESTS_GOLDEN_SAMPLES_H

#include "proto/codec.h"
#include "proto/message.h"

struct sample {
    struct message message; /* plan_create.bindings points into bindings below */
    struct message_binding bindings[EPD_MAX_BINDINGS];
};

/* Typical values; what the golden files hold. Changing one changes the wire: write a new file beside the old
 * one. */
void sample_typical(enum message_kind kind, struct sample *sample);
/* The least and the most that codec lets through, field by field. */
void sample_least(enum message_kind kind, struct sample *sample);
void sample_most(enum message_kind kind, struct sample *sample);
/* Who sends this kind. */
enum codec_side sample_side(enum message_kind kind);
/* 1 if both messages are equal in every field. */
int sample_equal(const struct message *a, const struct message *b);

#endif
