/* The one message that is sent for every step, written without the general packer, which goes through its description of the
 * message three times. The bytes are the same. */
#include "proto/codec_wire.h"

enum wire_type { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_LENGTH = 2 };

/* Tag and the longest varint. */
#define FIELD_BYTES 11
#define N_FIELDS    5
_Static_assert(N_FIELDS *FIELD_BYTES < 128, "the length of a launch is one byte");

static uint8_t *put_varint(uint8_t *at, uint64_t value)
{
    for (; value >= 128; value >>= 7)
        *at++ = (uint8_t)(value | 128);
    *at++ = (uint8_t)value;
    return at;
}

static uint8_t *put_tag(uint8_t *at, unsigned field, enum wire_type type)
{
    *at = (uint8_t)(field << 3 | type); /* fields up to 15 */
    return at + 1;
}

/* A zero is left out, here and below: that is how proto3 says it. */
static uint8_t *put_number(uint8_t *at, unsigned field, uint64_t value)
{
    return value ? put_varint(put_tag(at, field, WIRE_VARINT), value) : at;
}

static uint8_t *put_fixed64(uint8_t *at, unsigned field, uint64_t value)
{
    if (!value)
        return at;
    at = put_tag(at, field, WIRE_FIXED64);
    for (unsigned i = 0; i < 8; i++)
        *at++ = (uint8_t)(value >> 8 * i);
    return at;
}

size_t wire_encode_launch(const struct message_launch *launch, void *datagram)
{
    uint8_t *const length = put_tag(datagram, EPD__V1__DATAGRAM__BODY_LAUNCH, WIRE_LENGTH);
    uint8_t *at = length + 1;
    at = put_number(at, 1, launch->plan_id);
    at = put_number(at, 2, launch->seq);
    at = put_number(at, 3, launch->n_tokens);
    at = put_fixed64(at, 4, launch->shape_hash);
    at = put_number(at, 5, launch->n_repeats);
    *length = (uint8_t)(at - length - 1);
    return (size_t)(at - (uint8_t *)datagram);
}
