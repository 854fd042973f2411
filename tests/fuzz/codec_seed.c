/* Makes the fuzzer's seed corpus out of the golden messages: codec_seed DIRECTORY. Each seed is the side and
 * a datagram. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tests/golden/samples.h"

typedef void (*sample_fill)(enum message_kind kind, struct sample *sample);

static int write_seed(const char *directory, const char *flavour, enum message_kind kind, sample_fill fill)
{
    static struct sample sample;
    static unsigned char seed[1 + EPD_MAX_DATAGRAM_BYTES];
    char path[4096];
    struct epd_error error;
    size_t bytes;

    fill(kind, &sample);
    seed[0] = (unsigned char)(sample_side(kind) - 1);
    if (codec_encode(&sample.message, seed + 1, &bytes, &error)) {
        fprintf(stderr, "codec_seed: %s\n", error.text);
        return -1;
    }
    snprintf(path, sizeof path, "%s/%s_%s", directory, message_kind_name(kind), flavour);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(seed, 1, bytes + 1, file) != bytes + 1 || fclose(file) != 0) {
        fprintf(stderr, "codec_seed: %s: %s\n", path, strerror(errno));
        return -1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    int failed = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: codec_seed DIRECTORY\n");
        return 2;
    }
    if (mkdir(argv[1], 0755) < 0 && errno != EEXIST) {
        fprintf(stderr, "codec_seed: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    for (int kind = MESSAGE_NONE + 1; kind < MESSAGE_KIND_COUNT; kind++) {
        failed |= write_seed(argv[1], "typical", (enum message_kind)kind, sample_typical);
        failed |= write_seed(argv[1], "least", (enum message_kind)kind, sample_least);
        failed |= write_seed(argv[1], "most", (enum message_kind)kind, sample_most);
    }
    return failed ? 1 : 0;
}
