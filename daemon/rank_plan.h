/* One rank's plan: ties a session's plan id to the plan of ep, to its place in the session page, to the
 * buffers it is bound to, and, for a collective op, to the plans of the other ranks. Loop thread. */
#ifndef EPD_DAEMON_RANK_PLAN_H
#define EPD_DAEMON_RANK_PLAN_H

#include "daemon/joint_plan.h"
#include "daemon/list.h"
#include "ep/plan.h"
#include "proto/message.h"

struct buffer;
struct member;
struct session;

enum rank_plan_state {
    RANK_PLAN_CREATING, /* ep makes what the op needs; the request is answered when it calls back */
    RANK_PLAN_WAITING,  /* collective: waits for the other ranks' plans until the plan timer */
    RANK_PLAN_READY,    /* may be launched */
    RANK_PLAN_ENDING,   /* no id, no session list any more; waits until ep has let go of it */
};

struct rank_plan {
    uint64_t id;             /* 0 once ENDING */
    struct session *session; /* held */
    struct group *group;     /* held */
    struct member *member;   /* borrowed; NULL once ENDING */
    struct list in_session, in_member;
    enum rank_plan_state state;
    uint64_t request_id;
    enum epd_op op;
    uint32_t rank, flag_idx;
    struct plan *plan;        /* owned; NULL while CREATING */
    struct plan_set *set;     /* owned: of a local op; NULL otherwise */
    struct joint_plan *joint; /* of a collective op; NULL otherwise */
    uint32_t context_key;     /* of the joint plan that is its context; 0 if none */
    struct buffer **buffers;  /* owned array of borrowed buffers, one per binding */
    uint32_t n_buffers;
    uint32_t max_tokens; /* T of its tensors; 0 if it has none */
    int job;             /* ep will call back about its creation */
    int keeps;           /* ENDING: it is in use, and what it keeps counts until it is gone */
    uint64_t saved_bytes;
    uint32_t n_queued, n_flights;
    uint64_t n_launches, n_failed;
};

/* A plan request: answered now with an error, or later. */
EPD_MUST_CHECK enum epd_status rank_plan_create(struct session *session, uint64_t request_id,
                                                const struct message_plan_create *request,
                                                struct epd_error *error);
/* Takes the plan away from its session; the struct goes when ep has let go. Legal in every state. */
void rank_plan_destroy(struct rank_plan *plan);
/* Joint plan: all ranks are there; answers the request. */
void rank_plan_ready(struct rank_plan *plan);
/* Joint plan: it will never be complete; answers the request with the error and destroys. */
void rank_plan_refuse(struct rank_plan *plan, const struct epd_error *error);
const char *rank_plan_state_name(enum rank_plan_state state);

#endif
