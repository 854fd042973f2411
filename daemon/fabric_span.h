/* What node 0 keeps of one group that spans nodes, and what nodes have said about its plans and steps. Shared by the files
 * of the coordinator alone (fabric_coordinator.h). Loop thread of node 0. */
#ifndef EPD_DAEMON_FABRIC_SPAN_H
#define EPD_DAEMON_FABRIC_SPAN_H

#include "daemon/fabric.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/group_fields.h"
#include "daemon/list.h"

/* What nodes have said about one plan or one step. */
struct matter {
    uint32_t n;
    uint64_t there; /* bit per node */
    uint32_t first_node;
    uint64_t first_ns;
    uint32_t op;
    uint64_t hash;
    struct epd_error error; /* the first */
    int32_t rank;
};

struct plan_matter {
    struct list in_span;
    uint64_t key;
    uint64_t heard;    /* bit per node that knows of its failure, and says no more of it */
    uint32_t n_tokens; /* the most of those that have spoken */
    struct matter matter;
};

/* A group that spans nodes: being joined until id is not 0. Its nodes are those that have joined, each with one block of
 * the ranks. */
struct span {
    struct list in_coordinator;
    uint64_t id;
    char name[EPD_MAX_NAME_BYTES];
    uint32_t uid, world_size, n_nodes, first_node;
    int64_t config[GROUP_N_FIELDS];
    uint64_t nodes;                    /* bit per node of the fabric that has joined */
    uint64_t blocks;                   /* bit per block of ranks that one of them has */
    uint32_t node_of[EPD_MAX_NODES];   /* by block; where its bit is set */
    uint64_t local_ids[EPD_MAX_NODES]; /* by node: what it calls the group */
    uint64_t first_ns;
    struct fabric_address *addresses; /* [world_size] owned */
    struct list plans;                /* struct plan_matter: not decided, or not all have heard how */
    uint32_t n_plans;
    uint64_t n_gone;                            /* steps decided so far */
    uint64_t announced[EPD_MAX_NODES];          /* by node; at least n_gone */
    uint64_t gone_ns;                           /* when the last was decided */
    struct matter steps[COORDINATOR_MAX_AHEAD]; /* of step n at n modulo */
};

struct coordinator {
    struct fabric *fabric; /* borrowed */
    struct list spans;
    uint32_t n_spans;
    uint64_t next_id;
};

static inline uint32_t coordinator_n_nodes(const struct coordinator *coordinator)
{
    return coordinator->fabric->config.n_nodes;
}

static inline int span_has_node(const struct span *span, uint32_t node)
{
    return (int)(span->nodes >> node & 1);
}

/* nodes: bit per node of the fabric. */
void coordinator_tell(struct coordinator *coordinator, const struct fabric_message *message, uint64_t nodes);

/* A node's word. The first error counts. */
void matter_hear(struct matter *matter, uint32_t node, const struct fabric_message *message);
/* Not all nodes have spoken in time: its error names those that have not. what: "plan", "step". */
void matter_overdue(struct matter *matter, const struct span *span, const char *what, uint64_t number,
                    uint64_t limit_ms);

/* fabric_join.c: JOIN of a node, and the deadline of groups that are being joined. EPD_PROTOCOL if no honest node says
 * so. */
EPD_MUST_CHECK enum epd_status span_take_join(struct coordinator *coordinator, uint32_t node,
                                              const struct fabric_message *message, struct epd_error *error);
void span_check_join(struct coordinator *coordinator, struct span *span, uint64_t now_ns);
/* The node is gone; it may come back in time. */
void span_unjoin(struct coordinator *coordinator, struct span *span, uint32_t node);
/* An open group ends: its nodes but `from` are told what it said. Frees the span. */
void span_end(struct coordinator *coordinator, struct span *span, uint32_t from,
              const struct fabric_message *message);
void span_free(struct coordinator *coordinator, struct span *span);

/* fabric_plans.c: PLAN and HEARD of a node, deadlines, the end of the group. EPD_PROTOCOL if no honest node says so. */
EPD_MUST_CHECK enum epd_status span_take_plan(struct coordinator *coordinator, struct span *span,
                                              uint32_t node, const struct fabric_message *message,
                                              struct epd_error *error);
void span_take_heard(struct coordinator *coordinator, struct span *span, uint32_t node,
                     const struct fabric_message *message);
void span_check_plans(struct coordinator *coordinator, struct span *span, uint64_t now_ns);
void span_free_plans(struct span *span);

#endif
