/* The part of a group that lies on other nodes: what this node asks the fabric's coordinator and what it is told. Loop
 * thread; lives with its group.
 *
 * A group spans any nodes of the fabric, two or more. Its ranks fall into as many blocks as it has nodes, one on each; the
 * place of a node in the group is that of its block, and has nothing to do with its number in the fabric. The place is what
 * rails and teams know; the number is what people are told.
 *
 * Joining: the first rank that joins here says which block is here. When all of them have joined, rails are opened on their
 * lanes and the node joins; when a node has joined for every block, the rails are connected, and the group opens. A collective plan that all ranks of this node have made is
 * offered, and ready when all nodes have offered one like it. A step that all ranks of this node have asked for is
 * announced, and begins (go) when all nodes have; up to SPAN_MAX_AHEAD steps are announced ahead, so that the agreement
 * runs while earlier steps are on the devices. */
#ifndef EPD_DAEMON_GROUP_SPAN_H
#define EPD_DAEMON_GROUP_SPAN_H

#include "daemon/group.h"
#include "ep/rails.h"
#include "proto/fabric.h"

struct fabric;
struct joint_plan;

#define SPAN_MAX_AHEAD 32u

/* After the loss of node 0: time for the other nodes to see it too, before they see the rails of this one end and take it
 * for lost. */
#define SPAN_ABORT_MS 250u

enum group_span_state {
    SPAN_GATHERING,  /* waits for ranks of this node */
    SPAN_OPENING,    /* rails are being opened */
    SPAN_JOINED,     /* waits for the other nodes */
    SPAN_CONNECTING, /* rails are being connected */
    SPAN_OPEN,       /* plans and steps */
    SPAN_ENDED,      /* given up or broken: the coordinator has been told, or has said so */
};

/* A step that was announced and has not gone. */
struct span_step {
    uint64_t ranks;         /* bit per rank that takes part */
    struct epd_error error; /* it has failed here */
    int32_t rank;
    uint64_t announced_ns;
    uint64_t gather_ns, entry; /* for its flight */
};

struct group_span {
    uint32_t n_nodes, node, first_rank, n_ranks; /* node: place in the group; ranks of this node */
    uint32_t nodes[EPD_MAX_NODES];               /* by place: number in the fabric; known once id is */
    enum group_span_state state;
    uint64_t id;          /* of the fabric; 0 before it is open */
    struct rails *rails;  /* owned */
    int job;              /* rails are at work: the group is held */
    uint64_t abort_at_ns; /* 0: not; for the reason that the group has ended */
    uint64_t n_gone;      /* steps that have begun or failed; group->ordinal counts those announced */
    struct span_step steps[SPAN_MAX_AHEAD]; /* of step n at n modulo */
};

/* NULL-safe: the ranks of the group that are of this node. */
uint32_t group_first_rank(const struct group *group);
uint32_t group_n_ranks(const struct group *group);

/* The number in the fabric of the node that has the rank. 0: the group spans nodes and is not open, and the rank is not of
 * this one. */
int group_span_node(const struct group *group, uint32_t rank, uint32_t *node);

/* The request names other nodes: whether this daemon can, and makes group->span. */
EPD_MUST_CHECK enum epd_status
group_span_check(const struct worker *worker, const struct message_group_join *join, struct epd_error *error);
/* EPD_GROUP_MISMATCH if the rank is not of the block that the first one said. World size and configuration are the same. */
EPD_MUST_CHECK enum epd_status
group_span_compare(const struct group *group, const struct message_group_join *join, struct epd_error *error);
EPD_MUST_CHECK enum epd_status group_span_create(struct group *group, struct epd_error *error);
/* The join of a rank of this node was refused: the other nodes need not wait for it. */
void group_span_refuse_rank(const struct session *session, const struct message_group_join *join,
                            const struct epd_error *error);
/* The group's team is destroyed; goes with it. */
void group_span_destroy(struct group *group);
/* All ranks of this node are there. */
void group_span_begin(struct group *group);
/* The group has failed or is broken here; rank is to blame, -1 if none. */
void group_span_end(struct group *group, int32_t rank, const struct epd_error *error);

/* The plan of all ranks of this node is made; n_tokens: the most that one of them can have in a step. */
void group_span_offer(struct group *group, const struct joint_plan *joint, uint64_t hash, uint32_t n_tokens);
/* It cannot be made here. */
void group_span_refuse(struct group *group, const struct joint_plan *joint, const struct epd_error *error);

/* As many steps as may be are announced. */
int group_span_full(const struct group *group);
/* The step that the group gathers is complete here, or (error not NULL) has failed here. */
void group_span_announce(struct group *group, const struct epd_error *error, int32_t rank);

/* Tells the coordinator; what cannot be told needs not: then the way to it is gone, and it knows. */
void group_span_tell(struct group *group, const struct fabric_message *message);
/* A message of the coordinator; and GO of them, which group_span_steps.c takes. */
void group_span_receive(struct fabric *fabric, const struct fabric_message *message);
void group_span_take_go(struct fabric *fabric, struct group *group, const struct fabric_message *message);
/* Steps that lanes had no room for. */
void group_span_retry(struct fabric *fabric);
/* The way to the coordinator is there (again): groups that wait join. */
void group_span_rejoin(struct fabric *fabric);
/* The way to the coordinator is gone: every group that spans nodes is broken. Nobody can say which steps the others begin,
 * so what is on the lanes is ended too, after SPAN_ABORT_MS. */
void group_span_lose_all(struct fabric *fabric, const struct epd_error *why);
void group_span_beat(struct fabric *fabric, uint64_t now_ns);
const char *group_span_state_name(enum group_span_state state);

#endif
