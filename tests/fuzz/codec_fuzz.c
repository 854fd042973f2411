/* Whatever bytes arrive: no crash, no read past the end, and what decodes encodes again to a message that is
 * equal. The first byte picks the reading side, the rest is the datagram. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden/samples.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void decode_again(enum codec_side side, const struct message *message)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message again;
    struct epd_error error;
    size_t bytes;

    /* A peer may spell a plan with one run per part, which encodes shorter, or with runs that have to be
     * split. */
    enum epd_status status = codec_encode(message, datagram, &bytes, &error);
    assert(status == EPD_OK || (status == EPD_PROTOCOL && message->kind == MESSAGE_PLAN_CREATE));
    if (status != EPD_OK)
        return;
    assert(arena_init(&arena, EPD_MAX_ARENA_BYTES) == EPD_OK);
    assert(codec_decode(side, datagram, bytes, &arena, &again, &error) == EPD_OK);
    assert(sample_equal(message, &again));
    arena_fini(&arena);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct arena arena;
    struct message message;
    struct epd_error error = {0};

    if (bytes < 1)
        return 0;
    enum codec_side side = (enum codec_side)(1 + data[0] % 3);
    assert(arena_init(&arena, EPD_MAX_ARENA_BYTES) == EPD_OK);
    enum epd_status status = codec_decode(side, data + 1, bytes - 1, &arena, &message, &error);
    assert(status == EPD_OK ||
           (status == EPD_PROTOCOL && error.text[0] != 0 && message.kind == MESSAGE_NONE));
    if (status == EPD_OK)
        decode_again(side, &message);
    arena_fini(&arena);
    return 0;
}
