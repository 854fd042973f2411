/* struct epd_buffer: memory that both sides reach. Ended by epd_buffer_release or with its group. */
#ifndef EPD_CLIENT_BUFFER_H
#define EPD_CLIENT_BUFFER_H

#include <stdatomic.h>

#include "client/group.h"

struct epd_buffer {
    struct epd_group *group; /* borrowed: ends its buffers before itself */
    uint64_t buffer_id;
    enum epd_memory_kind kind;
    uint64_t bytes;
    uint64_t offset; /* imported: of the first byte in the client's allocation */
    void *data;
    void *mapping; /* owned: what to unmap; NULL if the memory is the client's own mapping */
    uint64_t mapping_bytes;
    int fd;                 /* owned duplicate of a registered memfd, to register it again; else -1 */
    atomic_uint n_bindings; /* tensors of plans that lie in it */
    TAILQ_ENTRY(epd_buffer) link;
};

/* Makes the buffer known to the daemon that its group is being recovered to: same memory for the client, same
 * address. */
EPD_MUST_CHECK enum epd_status buffer_restore(struct epd_buffer *buffer, struct epd_error *error);
/* Unmaps and frees without telling the daemon. */
void buffer_free(struct epd_buffer *buffer);

#endif
