/* Inside of a step, for step.c (loop thread: submit, complete) and step_lane.c (lane threads: run, decide,
 * finish). */
#ifndef EPD_EP_STEP_IMPL_H
#define EPD_EP_STEP_IMPL_H

#include "ep/barrier.h"
#include "ep/hop.h"
#include "ep/phase.h"
#include "ep/step.h"

/* One rank's part while it runs. Written by the rank's lane, read by all lanes after the last barrier. */
struct step_rank {
    struct epd_error error; /* of the host side: launch refused, no memory; EPD_OK otherwise */
    enum epd_phase phase;   /* where it was met */
    struct kernel_error records[PLAN_RECORD_COUNT];
    uint64_t generation; /* of the routing it used */
    int followed;        /* the error only says that a rank of another node has failed */
    int released;        /* its ready flag was set for a client that did not come */
};

/* Barriers of one step, at most; and steps whose barriers may be looked at while a lane is ahead. */
#define STEP_MAX_BARRIERS 32u
#define STEP_BARRIER_SETS 2u
/* How long a fused step may run once every rank's stream has reached it. Then it is ended: nothing on a device
 * waits for ever. */
#define STEP_DEAD_NS 60000000000ull
/* How often a lane asks its rails whether what waits in its streams still can end well: that takes locks, and a lane looks
 * at its steps without a pause. */
#define STEP_RAILS_NS 100000ull
_Static_assert(STEP_MAX_BARRIERS *STEP_BARRIER_SETS <= BACKEND_MARKS, "every barrier has its mark");

/* What the step came to; the same on every lane. */
struct step_verdict {
    struct epd_error error;
    enum epd_phase phase;
    int32_t rank; /* to blame; -1: none */
    struct kernel_error record;
};

/* How far a lane is in a step. Of a patient team a lane goes on with other jobs while it waits: for its turn, for the others
 * in a barrier, and for what crosses to be known; else it gets from the first to the last in one go. */
enum step_place {
    STEP_QUEUED,   /* the team's work before it is not submitted yet on this lane */
    STEP_RUNNING,  /* phase by phase */
    STEP_OFF,      /* takes the swaps that are left */
    STEP_LEAVING,  /* the lanes meet for the last time */
    STEP_SUBMITTED /* all its work is in the queue */
};

/* What has come of going on. */
enum step_pace { STEP_FAILED, STEP_DONE, STEP_LATER };

/* Where in the phases it is. */
struct step_walk {
    int begun;
    uint32_t phase_idx, stage;
    int met;              /* before this stage */
    int arrived;          /* in the barrier before it */
    uint32_t arrived_at;  /* of barrier_arrive */
    uint64_t told_ticket; /* of what tells the host what crosses; 0: not asked for yet */
    int looked;           /* a lane has looked for them as long as it may */
    int learnt;           /* it knows */
};

/* One lane's part. */
struct step_lane {
    struct lane_job job;
    enum step_place place;
    uint64_t turn; /* of the team's work on this lane */
    struct step_walk walk;
    int ran;     /* all its phases were submitted */
    int settled; /* the done flags and the reports are in the queue */
    struct step *step;
    struct team_lane *team_lane;
    uint32_t n_ranks;
    const uint32_t *ranks;  /* positions in the set, rising; borrowed */
    uint64_t before_ticket; /* of all that lies before the waits for its ranks' ready flags */
    uint64_t ready_ticket;  /* of these waits */
    uint64_t ticket;        /* of all its work */
    uint64_t begun_ns;
    int delivered; /* what its ranks report has come */
    int lost;      /* its device does not do what it was given: nobody knows which done flags were set */
    int committed; /* fused, and all lanes have met: from here on every one launches, or breaks the team */
    uint32_t n_breaks;   /* of the team, when it was checked */
    uint64_t running_ns; /* when its ready tickets were seen to be reached; 0: not yet */
    uint32_t n_barriers;
    struct hop_verdict agreed; /* of all nodes, of a team that spans them and works at once */
};

struct step {
    struct plan_set *set;
    int patient; /* the team's lanes do not wait for each other in it */
    struct step *next_free;
    struct team *team;
    enum epd_op op;
    /* Of the team's steps of all ranks, the same on all nodes, whatever local ops run between them; 0 of a local op. */
    uint64_t number;
    uint32_t n_ranks;    /* plans of the set */
    struct plan **plans; /* [n_ranks], as they were when the step was submitted */
    uint32_t *n_tokens;
    uint64_t *seqs;
    uint32_t zero; /* a local op's list of positions */

    struct barrier phases, last;
    _Atomic int failed; /* on the host side, on some lane */
    struct step_rank *ranks;
    struct step_rank_result *results;
    int32_t *counts;      /* [R, E] of the routing used, copied by the lane of position 0; NULL: none used */
    int64_t *splits;      /* [G] of a local op; NULL otherwise */
    int64_t *expert_rows; /* [E] */
    struct problem_traffic *traffic; /* [R] */
    struct hop_report *reports; /* [n_ranks, n_nodes] of a team that spans them and works later; else NULL */
    int32_t *
        sent; /* [ranks per node, n_nodes, R] of the routing used, as exchange_slots.sent; NULL like counts */

    uint32_t n_lanes;
    _Atomic uint32_t n_delivered; /* lanes whose reports have come */
    uint32_t n_lanes_left;        /* loop thread */
    step_callback callback;
    void *callback_arg;
    struct step_lane lanes[]; /* [n_lanes] */
};

/* step_lane.c */
void step_lane_run(struct lane_job *job, struct lane *lane);
/* 1 when all of it is submitted; until then to be called again. Waits for nothing if the step is patient. */
int step_lane_go_on(struct step_lane *lane);
/* step_walk.c */
/* Lanes meet, and their queues wait for each other's work. FAILED if the step is off. */
enum step_pace step_meet(struct step_lane *lane, struct barrier *barrier);
/* FAILED if the step is off: then other lanes may still be in any phase. */
enum step_pace step_walk_phases(struct step_lane *lane);
/* Begins the walk of a step that is off, on ranks that were told so: step_walk_off then until it is done. */
void step_walk_begin_off(struct step_lane *lane);
enum step_pace step_walk_off(struct step_lane *lane);
/* What the phases come to of which the counts do not come: the device is given up. */
void step_lose_device(struct step_lane *lane, uint32_t idx, struct epd_error *error);
struct rank_run step_rank_run(const struct step_lane *lane, uint32_t idx);
/* Ends the waiting of a fused step that this lane has not launched, or that does not end. */
void step_break(struct step_lane *lane);
/* step_graph.c: the phases of a step that is like the ones before it, as recorded work. */
/* 1 if there is such work for this step. */
int step_is_recorded(const struct step_lane *lane);
/* Records it if that is due: 1 if it is there then. A plan that cannot be recorded is not tried again; the team counts it
 * and keeps why. */
int step_record(const struct step_lane *lane);
EPD_MUST_CHECK enum epd_status step_replay(struct step_lane *lane, struct epd_error *error);
/* Notes that the phases were run one by one. */
void step_note_run(struct step_lane *lane);
void step_fail_rank(struct step_lane *lane, uint32_t idx, const struct epd_error *error,
                    enum epd_phase phase);
/* What a rank has come to cannot be told, to this node or to others. */
void step_fail_report(struct step_lane *lane, uint32_t idx, const struct epd_error *error);
/* step_end.c */
int step_lane_poll(struct lane_job *job, struct lane *lane);
/* step_verdict.c */
/* All lanes have met for the last time: the nodes agree on what the step came to. Where work is done at once. */
void step_agree(struct step_lane *lane);
/* The lane's ranks report to the other nodes what they have come to, when the device has. Where work goes on later. */
void step_report(struct step_lane *lane);
/* From the ranks of this node alone. */
struct step_verdict step_decide_here(const struct step *step);
/* When all of it has come. */
struct step_verdict step_decide(const struct step_lane *lane);

/* 1 if ranks of other nodes take part. */
static inline int step_spans(const struct step *step)
{
    return team_spans(step->team) && op_is_collective(step->op);
}

/* 1 if they report where the others agree. */
static inline int step_reports(const struct step *step)
{
    return step_spans(step) && step->team->hop->report;
}

#endif
