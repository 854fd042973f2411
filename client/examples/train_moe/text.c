#include "text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"

/* A text is held in memory whole; a larger file is refused rather than cut. */
#define MAX_TEXT_BYTES (256L << 20)

static enum epd_status read_all(FILE *file, struct text *text, const char *path)
{
    if (fseek(file, 0, SEEK_END) != 0)
        return EPD_SYSTEM;
    long n_bytes = ftell(file);
    if (n_bytes < 0 || n_bytes > MAX_TEXT_BYTES) {
        fprintf(stderr, "epd-train-moe: %s: %ld bytes, at most %ld are taken\n", path, n_bytes,
                MAX_TEXT_BYTES);
        return EPD_OUT_OF_RANGE;
    }
    rewind(file);
    unsigned char *bytes = malloc((size_t)n_bytes + 1);
    if (!bytes)
        return EPD_NO_MEMORY;
    if (fread(bytes, 1, (size_t)n_bytes, file) != (size_t)n_bytes) {
        fprintf(stderr, "epd-train-moe: %s: could not be read\n", path);
        free(bytes);
        return EPD_SYSTEM;
    }
    *text = (struct text){.bytes = bytes, .n_bytes = (size_t)n_bytes};
    return EPD_OK;
}

enum epd_status text_open(struct text *text, const struct settings *settings)
{
    *text = (struct text){0};
    FILE *file = fopen(settings->text_path, "rb");
    if (!file) {
        fprintf(stderr, "epd-train-moe: %s: %s\n", settings->text_path, strerror(errno));
        return EPD_SYSTEM;
    }
    enum epd_status status = read_all(file, text, settings->text_path);
    fclose(file);
    if (status == EPD_OK && text->n_bytes <= settings->context_bytes) {
        fprintf(stderr, "epd-train-moe: %s: %zu bytes, want more than the context of %u\n",
                settings->text_path, text->n_bytes, settings->context_bytes);
        text_close(text);
        return EPD_INVALID_ARGUMENT;
    }
    return status;
}

void text_close(struct text *text)
{
    free(text->bytes);
    *text = (struct text){0};
}

enum epd_status batch_init(struct batch *batch, const struct settings *settings)
{
    batch->context = malloc((size_t)settings->n_tokens * settings->context_bytes);
    batch->target = malloc(settings->n_tokens);
    if (batch->context && batch->target)
        return EPD_OK;
    batch_fini(batch);
    return EPD_NO_MEMORY;
}

void batch_fini(struct batch *batch)
{
    free(batch->context);
    free(batch->target);
    *batch = (struct batch){0};
}

void batch_take(struct batch *batch, const struct text *text, const struct settings *settings, uint32_t step,
                uint32_t rank)
{
    const uint32_t n_context = settings->context_bytes;
    const uint64_t key = random_at(settings->seed + 0x7e47, (uint64_t)step * MAX_RANKS + rank);
    for (uint32_t t = 0; t < settings->n_tokens; t++) {
        size_t position = n_context + random_at(key, t) % (text->n_bytes - n_context);
        for (uint32_t back = 0; back < n_context; back++)
            batch->context[(size_t)t * n_context + back] = text->bytes[position - 1 - back];
        batch->target[t] = text->bytes[position];
    }
}
