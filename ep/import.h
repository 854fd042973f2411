/* Client memfds mapped into this process: one mapping serves all imports that lie inside it, as long as one
 * of them is left. Keyed by the file (st_dev, st_ino), never by the fd number. One cache per device of the
 * host backend; lane thread. */
#ifndef EPD_EP_IMPORT_H
#define EPD_EP_IMPORT_H

#include <stdint.h>
#include <sys/types.h>

#include "proto/status.h"

struct import_mapping {
    dev_t device;
    ino_t inode;
    uint64_t first_byte; /* of the file; a multiple of the page size */
    uint64_t n_bytes;
    char *base;
    uint32_t n_imports;
    struct import_mapping *next;
};

struct import_cache {
    struct import_mapping *first; /* owned */
};

/* Where a range of a memfd lies in this process. */
struct import_range {
    void *data;
    struct import_mapping *mapping;
    uint64_t mapped_bytes; /* 0: an existing mapping serves it */
};

/* Refuses what is no memfd, what can still be shrunk (reading past its end would raise SIGBUS here), and
 * ranges that are not inside the file. The fd stays the caller's and is not needed afterwards. */
EPD_MUST_CHECK enum epd_status import_acquire(struct import_cache *cache, int fd, uint64_t offset,
                                              uint64_t bytes, struct import_range *range,
                                              struct epd_error *error);
/* Returns the bytes unmapped. */
uint64_t import_release(struct import_cache *cache, struct import_mapping *mapping);

#endif
