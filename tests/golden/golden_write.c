/* Writes the golden datagrams: golden_write --write DIRECTORY. Existing files are never overwritten, since
 * datagrams of an older version have to stay readable. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/golden/samples.h"

static int write_sample(const char *directory, const struct sample *sample)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    char path[4096];
    size_t bytes;
    struct epd_error error;

    if (codec_encode(&sample->message, datagram, &bytes, &error)) {
        fprintf(stderr, "golden_write: %s\n", error.text);
        return -1;
    }
    snprintf(path, sizeof path, "%s/%s.bin", directory, message_kind_name(sample->message.kind));
    FILE *file = fopen(path, "wbx");
    if (!file && errno == EEXIST)
        return 0;
    if (!file || fwrite(datagram, 1, bytes, file) != bytes || fclose(file) != 0) {
        fprintf(stderr, "golden_write: %s: %s\n", path, strerror(errno));
        return -1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct sample *sample = malloc(sizeof *sample);

    if (argc != 3 || strcmp(argv[1], "--write") != 0 || !sample) {
        fprintf(stderr, "usage: golden_write --write DIRECTORY\n");
        free(sample);
        return 2;
    }
    int failed = 0;
    for (int kind = MESSAGE_NONE + 1; kind < MESSAGE_KIND_COUNT; kind++) {
        sample_typical((enum message_kind)kind, sample);
        failed |= write_sample(argv[2], sample);
    }
    free(sample);
    return failed ? 1 : 0;
}
