/* Inside of a team, for the files of ep. */
#ifndef EPD_EP_TEAM_IMPL_H
#define EPD_EP_TEAM_IMPL_H

#include "ep/node_impl.h"
#include "ep/problem.h"
#include "ep/scratch.h"
#include "ep/team.h"

/* The part of a team that one lane runs. */
struct team_lane {
    struct lane *lane;           /* borrowed from the node */
    struct backend_queue *queue; /* made on the lane by the first plan; NULL before */
    struct team *team;
    uint32_t n_ranks;
    uint32_t ranks[EPD_MAX_WORLD_SIZE]; /* positions among the ranks of this node, rising */
    /* Lane thread. */
    uint32_t n_committed;    /* fused steps that are launched and have not ended */
    uint64_t rails_asked_ns; /* when its rails were last asked how they are, for all of its steps */
    int rails_seen_broken;
    uint64_t n_turns, n_passed; /* what was given to the queue, and what is all in it (team_lane_has_turn) */
    struct lane_job end_job;
};

/* What goes into a team's queue takes its turn there: a step of a patient team may wait between two parts of its work, and
 * nothing of the team may come between them. Lane thread. */
static inline uint64_t team_lane_take_turn(struct team_lane *lane)
{
    return lane->n_turns++;
}

static inline int team_lane_has_turn(const struct team_lane *lane, uint64_t turn)
{
    return lane->n_passed == turn;
}

static inline void team_lane_pass(struct team_lane *lane)
{
    lane->n_passed++;
}

struct team_rank {
    uint32_t device_idx;
    uint32_t lane_idx;               /* in team->lanes */
    struct scratch scratch;          /* lane thread */
    struct hop_desk *desk;           /* of hop_form_host; lane thread */
    struct hop_desk_cuda *desk_cuda; /* of hop_form_cuda; likewise */
    int has_desk;                    /* the one or the other */
    _Atomic uint64_t heap_bytes;
};

struct team {
    struct node *node; /* borrowed, outlives the team */
    struct problem problem;
    struct rails *rails;        /* borrowed; NULL unless the team spans nodes */
    const struct hop_form *hop; /* how it does; likewise */
    uint32_t n_lanes;
    struct team_lane lanes[EPD_MAX_DEVICES];
    struct team_rank *ranks; /* [world_size], owned */
    int fused;               /* the form of its exchanges */
    uint32_t
        resident_blocks; /* counted on each of its devices while it lives; 0 where none of its kernels waits */
    /* A fused op was not launched on all ranks: their workspaces are void until the lanes have reset them, and
     * every step until then is refused. Any lane. */
    _Atomic int broken;
    _Atomic uint32_t n_breaks;     /* ever */
    _Atomic uint32_t n_reset;      /* lanes that have reset theirs since the last */
    _Atomic uint32_t n_unrecorded; /* plans that could not be made graphs; any lane */
    struct epd_error unrecorded;   /* the first one's reason, written before unrecorded_told */
    _Atomic int unrecorded_told;
    /* Loop thread. */
    uint32_t n_plans;
    uint64_t n_joint_steps; /* ever submitted, of all ranks */
    /* A plan was made whose steps wait for what crosses: from here on no lane waits for another in a step of the team, for
     * that one may wait for a client who waits for what lies behind it in a third. */
    int patient;
    uint32_t n_lanes_left; /* while it ends */
    uint32_t n_refused;    /* launches that its lanes are handing back */
};

static inline int team_spans(const struct team *team)
{
    return team->rails != NULL;
}

/* Owned memory of a rank, counted for team_heap_bytes. Lane thread of the rank. */
EPD_MUST_CHECK enum epd_status team_alloc(struct team *team, uint32_t rank, uint64_t bytes,
                                          struct backend_block *block, struct epd_error *error);
void team_free(struct team *team, uint32_t rank, struct backend_block *block);
EPD_MUST_CHECK enum epd_status team_scratch(struct team *team, uint32_t rank, enum scratch_region region,
                                            void **data, struct epd_error *error);
/* The queue of the rank's lane, made if it is not there. */
EPD_MUST_CHECK enum epd_status team_queue(struct team *team, uint32_t rank, struct backend_queue **queue,
                                          struct epd_error *error);

#endif
