/* An EP group: the ranks that have joined under one name, their agreement, and what becomes of it when one of
 * them is lost. Names belong to a uid: another uid's group of the same name is another group. Loop thread.
 *
 * Lifetime: counted. Members, plans that are not gone, steps on the lanes and the timer hold it; with the
 * last one the team and the struct go. */
#ifndef EPD_DAEMON_GROUP_H
#define EPD_DAEMON_GROUP_H

#include <uv.h>

#include "daemon/list.h"
#include "daemon/stats.h"
#include "daemon/worker.h"
#include "ep/team.h"
#include "proto/message.h"

struct group_span;
struct member;
struct session;
struct team_span;

/* Collective plans that not every rank has created yet. */
#define GROUP_MAX_JOINT_PLANS 4096

/* A timer that fires this much too late says that the daemon did not run; then nobody is blamed for this
 * long. */
#define GROUP_LATE_NS  (500ull * 1000000ull)
#define GROUP_GRACE_NS (200ull * 1000000ull)
/* A group that only waits for other nodes waits this much longer. */
#define GROUP_JOIN_GRACE_MS 1000u

enum group_state {
    GROUP_JOINING, /* waits for missing ranks until the join timer; joins are answered when it ends */
    GROUP_OPEN,    /* plans and launches; joins of its name get EPD_IN_USE */
    GROUP_BROKEN,  /* a rank is gone (or the join failed): collective plans and launches get `lost`, local
                      ones go on; the name is free */
};

/* The collective step that is being gathered: every rank's next collective launch. It has no list of its own:
 * what has arrived is at the front of the ranks' launch queues. */
struct gather {
    uint64_t arrived; /* bit r: the front launch of rank r takes part */
    uint32_t n_arrived;
    uint32_t first_rank, last_rank;
    uint64_t first_ns,
        last_ns; /* requests of the first and the newest rank, not before the last step was handed over */
    uint64_t ended_ns; /* when the one before ended: a queued launch does not wait for its turn on this one's
                          deadline */
    uint64_t entry;    /* serial in the flight recorder */
    int warned;
    int blocked; /* complete, but a lane ring was full */
};

struct group {
    struct worker *worker; /* borrowed, outlives this */
    struct list in_worker, in_blocked;
    uint64_t id;
    char name[EPD_MAX_NAME_BYTES];
    uint32_t uid;
    enum group_state state;
    uint32_t world_size, n_members;
    uint32_t first_joiner; /* whose configuration is compared with */
    struct message_group_config config;
    uint64_t epoch;
    uint64_t created_ns;
    struct team *team;                          /* owned; NULL while joining */
    struct group_span *span;                    /* owned; NULL if all ranks are of this node */
    struct member *members[EPD_MAX_WORLD_SIZE]; /* by rank; NULL: not joined, gone, or of another node */
    /* Borrowed: what `queues` and `left_bytes` count against; NULL while nobody has joined. */
    struct account *account;
    uint64_t left_bytes; /* that plans of ranks that have left hold; their uid's until the group is gone */
    uint32_t queues[EPD_MAX_DEVICES]; /* that it takes of each device; its uid's until it is gone */

    struct list joint_plans;
    uint32_t n_joint_plans;
    struct gather gather;
    uint64_t ordinal;       /* collective steps handed over, announced (group_span.h) or failed so far */
    uint64_t drain_ordinal; /* while draining: the last step that may still run */

    struct epd_error lost; /* BROKEN: what it gets; lost_rank is to blame, -1 if none */
    int32_t lost_rank;
    int closed;              /* BROKEN: by a rank that left while nobody waited for a step */
    struct epd_error missed; /* what a rank gets that comes to a step that ended without it */
    int32_t missed_rank;

    uv_timer_t timer;
    uint64_t timer_at_ns; /* CLOCK_NEVER when not armed */
    uint32_t n_refs;
    uint32_t n_flights;
    uint64_t n_launches, n_failed; /* steps */
    struct load load;
};

/* A join request: answered now with an error, or later when the group is complete or has failed. */
EPD_MUST_CHECK enum epd_status group_join(struct session *session, uint64_t request_id,
                                          const struct message_group_join *join, struct epd_error *error);
/* The join was refused (error) before it came to group_join, by a limit of this rank's own: nobody comes in its place before
 * the join timer, so the others learn of it now, where the group is being joined, the place is free and the configuration is
 * the same; on other nodes too. Groups of other uids are other groups. A join that asks for what no group can be is no
 * news to anybody. group_join does this itself. */
void group_refuse_rank(struct session *session, const struct message_group_join *join,
                       const struct epd_error *error);
/* For group_join.c: a group without members, and what to do when all ranks of this node are there. */
EPD_MUST_CHECK enum epd_status group_create(struct session *session, const struct message_group_join *join,
                                            struct group **result, struct epd_error *error);
void group_begin(struct group *group);
/* The group of this id in which the session is a member: EPD_UNKNOWN_ID, EPD_FOREIGN_ID or EPD_STALE_EPOCH.
 */
EPD_MUST_CHECK enum epd_status group_find_member(struct session *session, uint64_t group_id,
                                                 struct member **member, struct epd_error *error);
/* A rank has gone: everything pending and everything later ends with the error. Idempotent: the first loss
 * counts. */
void group_break(struct group *group, int32_t rank, const struct epd_error *error);
/* The same. orderly: a rank has left on purpose while nobody waited for a step, which is no fault: the group is called closed. */
void group_end(struct group *group, int32_t rank, const struct epd_error *error, int orderly);
/* All ranks are there, on other nodes too (span: how): plans and launches. */
void group_open(struct group *group, const struct team_span *span);
/* All joins of a group that is not complete end with the error. */
void group_fail_join(struct group *group, const struct epd_error *error);

void group_hold(struct group *group);
void group_release(struct group *group);
/* Looks at the group's deadlines at this time or before. */
void group_arm(struct group *group, uint64_t at_ns);
/* 1 if some rank has asked for a step that has not begun. */
int group_asked(const struct group *group);
/* 1 if nothing is queued and nothing runs. */
int group_idle(const struct group *group);
/* The worker drains: joins fail, steps that somebody has asked for may still run. */
void group_drain(struct group *group);
/* "joining", "open", "broken" or "closed". */
const char *group_state_name(const struct group *group);

#endif
