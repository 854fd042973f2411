/* Ids of this worker: sessions, groups, buffers, plans. Ids grow from 1 and are never used twice, also not
 * across worker restarts: the n-th worker of a supervisor counts from n * REGISTRY_IDS_PER_WORKER, so that an
 * id of an earlier worker is recognised as stale instead of meaning something else. Loop thread. Lookups are
 * O(1) and allocate nothing. */
#ifndef EPD_DAEMON_REGISTRY_H
#define EPD_DAEMON_REGISTRY_H

#include <stddef.h>

#include "proto/status.h"

#define REGISTRY_IDS_PER_WORKER 1000000000000ull

enum registry_kind {
    REGISTRY_SESSION = 0,
    REGISTRY_GROUP,
    REGISTRY_BUFFER,
    REGISTRY_PLAN,
    REGISTRY_KIND_COUNT
};

struct registry_slot {
    uint64_t id;    /* 0: free */
    uint64_t owner; /* session id; 0: nobody in particular */
    void *object;   /* borrowed */
};

struct registry_table {
    struct registry_slot *slots; /* owned, [capacity], open addressing */
    size_t capacity, n_used;
    uint64_t last_id;
};

struct registry {
    uint64_t base; /* ids of this worker are larger */
    struct registry_table tables[REGISTRY_KIND_COUNT];
};

void registry_init(struct registry *registry, uint64_t generation);
/* All objects must have been removed. */
void registry_fini(struct registry *registry);
EPD_MUST_CHECK enum epd_status registry_add(struct registry *registry, enum registry_kind kind,
                                            uint64_t owner, void *object, uint64_t *id,
                                            struct epd_error *error);
void registry_remove(struct registry *registry, enum registry_kind kind, uint64_t id);
/* NULL if there is none. */
void *registry_find(const struct registry *registry, enum registry_kind kind, uint64_t id);
/* For ids that came from a client: EPD_UNKNOWN_ID, EPD_FOREIGN_ID or EPD_STALE_EPOCH, with kind and id in the
 * text. */
EPD_MUST_CHECK enum epd_status registry_find_owned(const struct registry *registry, enum registry_kind kind,
                                                   uint64_t id, uint64_t owner, void **object,
                                                   struct epd_error *error);
size_t registry_count(const struct registry *registry, enum registry_kind kind);

#endif
