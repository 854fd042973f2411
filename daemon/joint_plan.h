/* A collective plan of a group: the plans that its ranks created as their key-th collective plan, waiting for
 * each other and then joined in a plan set. Loop thread; freed when every rank has arrived and gone, or with
 * the group. */
#ifndef EPD_DAEMON_JOINT_PLAN_H
#define EPD_DAEMON_JOINT_PLAN_H

#include "daemon/list.h"
#include "ep/plan.h"

struct fabric_message;
struct group;
struct member;
struct rank_plan;

enum joint_plan_state {
    JOINT_PLAN_GATHERING, /* waits for ranks until the plan timer */
    JOINT_PLAN_READY,     /* can be launched */
    JOINT_PLAN_FAILED,    /* some rank's plan was refused or is missing: every rank gets `error` */
    JOINT_PLAN_ENDING,    /* some rank has destroyed its plan: launches get EPD_UNKNOWN_ID */
};

struct joint_plan {
    struct group *group; /* borrowed: the group ends its joint plans before itself */
    struct list in_group;
    uint32_t key; /* from 1 */
    enum joint_plan_state state;
    enum epd_op op;
    uint32_t n_ranks, base_rank; /* of this node: base_rank and the following */
    uint32_t first_rank;
    int offered; /* all ranks of this node are ready, and the other nodes have been told */
    uint32_t n_arrived, n_ready, n_left;
    uint64_t arrived; /* bit r: rank r has asked for it */
    uint64_t first_ns;
    int32_t ended_by;          /* ENDING: the rank that destroyed its plan */
    struct epd_error error;    /* FAILED */
    struct plan_set *set;      /* owned; READY only */
    struct rank_plan *plans[]; /* [n_ranks], from base_rank; NULL: not there yet, or gone */
};

/* The member's next collective plan. EPD_PLAN_MISMATCH, or what another rank failed with, when it can no
 * longer work: then the member's plan is counted as arrived and gone. */
EPD_MUST_CHECK enum epd_status joint_plan_arrive(struct member *member, enum epd_op op,
                                                 struct joint_plan **joint, struct epd_error *error);
/* The rank's plan has been made; with the last one all are joined and answered. plan->joint is the joint
 * plan. */
void joint_plan_add(struct joint_plan *joint, struct rank_plan *plan);
/* The rank's plan cannot be made: all ranks that wait, and all that come later, get the error. */
void joint_plan_fail(struct joint_plan *joint, int32_t rank, const struct epd_error *error);
/* What the fabric has decided about a plan of a group that spans nodes: READY, or the error. */
void joint_plan_agreed(struct group *group, const struct fabric_message *ready);
/* The rank's plan is being destroyed, or was never made. May free the joint plan. */
void joint_plan_leave(struct joint_plan *joint, uint32_t rank);
/* Fails it if it has gathered for longer than the timer; returns when to look again, CLOCK_NEVER if not. */
uint64_t joint_plan_check(struct joint_plan *joint, uint64_t now_ns);
/* The group is broken: everything that gathers fails. */
void joint_plan_fail_all(struct group *group, const struct epd_error *error);
/* The group goes. */
void joint_plan_free_all(struct group *group);

#endif
