/* A buffer of a session: id, bytes, and the memory of ep behind it. Loop thread. */
#ifndef EPD_DAEMON_BUFFER_H
#define EPD_DAEMON_BUFFER_H

#include "daemon/list.h"
#include "ep/memory.h"
#include "proto/message.h"

struct session;

struct buffer {
    uint64_t id;
    struct session *session; /* held while the job runs; borrowed otherwise */
    struct list in_session;
    struct memory *memory; /* owned reference; NULL while ep makes it */
    enum epd_memory_kind kind;
    uint64_t group_id;
    uint64_t bytes; /* counted: those asked for, then all that the allocation takes */
    uint32_t device_idx;
    uint32_t n_plans;  /* bindings of plans to it */
    uint32_t n_ending; /* of these, of plans that nobody can name any more */
    uint64_t request_id;
    int dropped; /* nobody can name it any more; it goes when ep has made it, or with its last plan */
};

/* Both are answered when ep calls back; an error returned is to be answered at once. */
EPD_MUST_CHECK enum epd_status buffer_alloc(struct session *session, uint64_t request_id,
                                            const struct message_buffer_alloc *request,
                                            struct epd_error *error);
/* Takes over fd in every case (-1: none). */
EPD_MUST_CHECK enum epd_status buffer_register(struct session *session, uint64_t request_id,
                                               const struct message_buffer_register *request, int fd,
                                               struct epd_error *error);
/* EPD_IN_USE while a plan is bound to it that is not ending. */
EPD_MUST_CHECK enum epd_status buffer_release(struct session *session, uint64_t buffer_id,
                                              struct epd_error *error);
/* The session or the group ends. Plans of the session's other groups, and plans that end but are in use, may still be bound
 * to it: then it lives, and counts against the quotas, as long as they do. */
void buffer_drop(struct buffer *buffer);
/* A plan is bound to it, or is so no more. */
void buffer_bind(struct buffer *buffer);
void buffer_unbind(struct buffer *buffer);
/* The plan is ending: in use it keeps the memory, but no longer keeps the buffer from being released. */
void buffer_bind_ending(struct buffer *buffer);
void buffer_unbind_ending(struct buffer *buffer);

#endif
