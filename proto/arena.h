/* A bounded, zeroing bump allocator for one decode: protobuf-c gets its memory here, so that a small datagram cannot
 * make a large heap, and everything is freed at once. One thread; the buffer is the arena's own. */
#ifndef EPD_PROTO_ARENA_H
#define EPD_PROTO_ARENA_H

#include <stddef.h>

#include "proto/status.h"

struct arena {
    unsigned char *data; /* owned, size bytes, all zero beyond used */
    size_t size, used;
    size_t peak;   /* high-water mark since init */
    int exhausted; /* an allocation was refused since the last reset */
};

/* Reserves max_bytes of address space; pages are touched as they are used. */
EPD_MUST_CHECK enum epd_status arena_init(struct arena *arena, size_t max_bytes);
void arena_fini(struct arena *arena);
/* 16-byte aligned, zeroed; NULL when the arena is exhausted. */
void *arena_alloc(struct arena *arena, size_t bytes);
/* Forgets everything; memory handed out before is zeroed for the next user. */
void arena_reset(struct arena *arena);

#endif
