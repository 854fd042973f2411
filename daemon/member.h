/* One rank of a group: the tie between a session and a group, with the rank's launches in the order of its
 * calls. Loop thread; lives from join to leave, session end, or failed join. */
#ifndef EPD_DAEMON_MEMBER_H
#define EPD_DAEMON_MEMBER_H

#include "daemon/group.h"
#include "daemon/launch_queue.h"

struct member {
    struct group *group;     /* held */
    struct session *session; /* borrowed, outlives this */
    struct list in_session;
    struct list plans; /* struct rank_plan */
    uint32_t rank, device_idx;
    uint32_t n_queues;        /* of the device, counted against the session */
    uint64_t heap_bytes;      /* that its plans hold on the device (scratch, routing, contexts), as counted */
    uint64_t join_request_id; /* of the join that is not answered yet */

    struct launch_queue queue;
    int announced;   /* its next launch takes part in the group's gather */
    uint32_t ahead;  /* launches at the front that wait for other nodes: announced, not begun */
    int window_full; /* the session is paused for this queue */
    uint64_t last_seq;
    uint64_t ordinal; /* collective steps of this rank handed over or failed */
    uint32_t n_collective_plans;
    uint64_t missing_since_ns; /* a step timed out for want of this rank; 0 once it has launched again */

    uint64_t came_last,
        held_up_ns; /* straggling: steps for which it came last, and how long the first had waited */
};

EPD_MUST_CHECK enum epd_status member_create(struct group *group, struct session *session, uint32_t rank,
                                             uint32_t device_idx, uint64_t request_id, struct member **member,
                                             struct epd_error *error);
/* Ends the membership: queued launches fail, plans are destroyed, the group is broken if it was open. why: what
 * this rank's own launches end with; the others get EPD_PEER_LOST with its text, or the same if it is the whole
 * daemon that ends (EPD_DRAINING, EPD_RESTARTED): then no rank is to blame; or, where another node is lost, of that.
 * on_purpose: it has asked for it. */
void member_leave(struct member *member, const struct epd_error *why, int on_purpose);
/* Counts anew what its plans hold: some is made with the first plan that needs it, and stays until the group is gone. */
void member_count_heap(struct member *member);
/* Frees a member that never became part of an open group. */
void member_destroy(struct member *member);

/* A launch of one of this rank's plans has arrived. */
void member_launch(struct member *member, struct rank_plan *plan, const struct message_launch *launch);
/* The first launch that is not announced to other nodes yet; NULL if there is none. */
struct launch *member_next(struct member *member);
/* The last collective step that this rank has asked for so far. */
uint64_t member_asked(struct member *member);
/* The first launch ends without running. */
void member_fail_first(struct member *member, const struct epd_error *error, enum epd_phase phase,
                       int32_t rank);
/* The first launch has been handed over or has failed. */
void member_pop(struct member *member);

#endif
