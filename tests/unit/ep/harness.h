/* The execution layer without a daemon: a node, a loop that polls it, and the clients of a group: their
 * pages, their memory (mapped as a client maps it), their plans and launches. A failure of the harness itself
 * ends the test.
 *
 * EPD_TEST_NODES=n: the group of a crew whose ranks divide by n spans n nodes, all in this process: each with devices,
 * a team, plan sets and steps of its own, joined by rails. What the tests ask for stays the same.
 *
 * EPD_TEST_CROSSING=eager or static: what plans cross with that do not say it, nor have a context. */
#ifndef EPD_TESTS_UNIT_EP_HARNESS_H
#define EPD_TESTS_UNIT_EP_HARNESS_H

#include <check.h>
#include <stdatomic.h>

#include "ep/rails.h"
#include "ep/step.h"
#include "tests/reference/values.h"

#define HARNESS_MAX_RANKS    8
#define HARNESS_MAX_NODES    4
#define HARNESS_MAX_BINDINGS 64
#define HARNESS_MAX_SLABS    512

struct harness {
    struct node *node; /* nodes[0] */
    struct node *nodes[HARNESS_MAX_NODES];
    uint32_t n_nodes;
    _Atomic uint32_t bell; /* futex word: notify was called */
    int n_fds;             /* open before the node was */
    int imports;           /* clients bring memfds of their own instead of memory of the heap */
};

/* 1 if a crew of these ranks spans all the nodes that EPD_TEST_NODES asks for. */
int harness_spans(uint32_t world_size);
void harness_open(struct harness *harness, uint32_t n_devices, uint64_t heap_limit_bytes);
/* Checks that every byte, import and fd is back. */
void harness_close(struct harness *harness);
/* Polls until *flag is set. */
void harness_wait(struct harness *harness, const int *flag);
/* Waits until every job of every lane has been completed. */
void harness_settle(struct harness *harness);

enum epd_status harness_acquire(struct harness *harness, const struct memory_request *request,
                                struct memory **memory, struct epd_error *error);

/* A tensor in a client's memory. */
struct slab {
    void *data; /* as the client sees it */
    uint64_t offset, bytes;
    enum epd_dtype dtype;
    uint32_t n_dims;
    int64_t shape[3];
};

/* One rank: a session with its page and one buffer, from which tensors are taken with poisoned gaps between
 * them. */
struct client {
    struct page *page;
    int page_fd;
    struct memory *memory;
    char *base;
    void *device; /* where the memory is on its device, if base is a copy */
    uint64_t bytes, used;
    uint32_t n_flags;
    uint32_t n_slabs;
    uint64_t gap_at[HARNESS_MAX_SLABS], gap_bytes[HARNESS_MAX_SLABS]; /* behind each slab */
};

/* A group and its clients. */
struct crew {
    struct harness *harness; /* borrowed */
    struct team *team;       /* teams[0] */
    uint32_t n_nodes;
    struct team *teams[HARNESS_MAX_NODES];
    struct rails *rails[HARNESS_MAX_NODES]; /* of several nodes */
    struct message_group_config config;
    uint32_t world_size;
    uint32_t device_idx[HARNESS_MAX_RANKS];
    struct client clients[HARNESS_MAX_RANKS];
    uint64_t seq;
};

/* Rank r lives on device r modulo n_devices. */
void crew_init(struct crew *crew, struct harness *harness, const struct message_group_config *config,
               uint32_t world_size, uint64_t bytes_per_rank);
/* Checks that nothing was written between the tensors. */
void crew_fini(struct crew *crew);

/* Poisoned; n_dims 1..3, missing dimensions 0. */
struct slab client_take(struct client *client, enum epd_dtype dtype, uint32_t n_dims, int64_t d0, int64_t d1,
                        int64_t d2);
/* The same, with the given bytes in it. */
struct slab client_put(struct client *client, enum epd_dtype dtype, uint32_t n_dims, int64_t d0, int64_t d1,
                       int64_t d2, const void *data);
void slab_poison(const struct slab *slab);

/* A plan request under construction. */
struct draft {
    struct plan_request request;
    struct plan_binding bindings[HARNESS_MAX_BINDINGS];
};

void draft_init(struct draft *draft, struct crew *crew, uint32_t rank, enum epd_op op);
void draft_bind(struct draft *draft, struct crew *crew, enum epd_role role, const struct slab *slab);
/* Part part_idx of n_parts. */
void draft_bind_part(struct draft *draft, struct crew *crew, enum epd_role role, uint32_t part_idx,
                     uint32_t n_parts, const struct slab *slab);

/* The plans of all ranks (of a local op: of one), joined. */
struct crew_plan {
    struct crew *crew;
    uint32_t n;
    struct plan *plans[HARNESS_MAX_RANKS];
    struct plan_set *set; /* sets[0] */
    uint32_t n_nodes;     /* 1 for a local op */
    struct plan_set *sets[HARNESS_MAX_NODES];
    uint32_t ranks[HARNESS_MAX_RANKS], flag_idx[HARNESS_MAX_RANKS];
    uint64_t seen[HARNESS_MAX_RANKS];
};

/* NULL and the error if it is refused. */
struct plan *draft_create(struct draft *draft, struct crew *crew, struct epd_error *error);
void crew_plan_create(struct crew_plan *plan, struct crew *crew, struct draft *drafts, uint32_t n);
void crew_plan_destroy(struct crew_plan *plan);
/* Of every node; the plans stay. */
void crew_plan_destroy_sets(struct crew_plan *plan);
/* Waits until the plan is gone. */
void harness_destroy_plan(struct harness *harness, struct plan *plan);

/* What a launch came to, as the clients see it and as the daemon does. */
struct outcome {
    int ended;
    uint32_t n_left; /* nodes */
    struct outcome_part {
        struct outcome *outcome;
        uint32_t node, first_rank;
    } parts[HARNESS_MAX_NODES];
    uint32_t n_ranks;
    struct step_rank_result ranks[HARNESS_MAX_RANKS];
    int64_t expert_rows[64];
    int has_expert_rows;
    struct page_entry entries[HARNESS_MAX_RANKS]; /* of failed ranks */
};

/* Sets ready (but for ranks whose bit is in liars), submits; launch_wait waits for done of every rank. */
void launch_start(struct crew_plan *plan, const uint32_t *n_tokens, uint32_t liars, struct outcome *outcome);
void launch_wait(struct crew_plan *plan, struct outcome *outcome);
void launch(struct crew_plan *plan, const uint32_t *n_tokens, struct outcome *outcome);
/* launch, and all ranks must end with the status. */
void launch_expect(struct crew_plan *plan, const uint32_t *n_tokens, enum epd_status status);

/* What suite_run returns where the backend cannot run. */
#define HARNESS_SKIPPED 77

/* EPD_TEST_CASE in the environment: only tests whose name has it. */
int suite_run(const char *name, const TTest *const *tests, size_t n_tests);

#endif
