/* What ranks do in tests of a fabric: steps of one layer, until all is done or until a node is lost. */
#ifndef EPD_TESTS_INTEGRATION_FABRIC_RANKS_H
#define EPD_TESTS_INTEGRATION_FABRIC_RANKS_H

#include <jansson.h>

#include "proto/message.h"
#include "tests/integration/fabric/fabric_process.h"
#include "tests/integration/layer.h"

#define FABRIC_CASE "uniform f32"
/* A node that is silent for this long is lost; and how long its loss may take to be told. */
#define FABRIC_NODE_DEAD      "1s"
#define FABRIC_TOLD_WITHIN_MS 4000

/* Tensors of a forward plan. */
enum {
    FORWARD_X,
    FORWARD_IDX,
    FORWARD_WEIGHTS,
    FORWARD_W1,
    FORWARD_B1,
    FORWARD_W2,
    FORWARD_B2,
    FORWARD_OUT,
    FORWARD_SPLITS,
    FORWARD_COUNT
};

/* Arguments of daemons with timers that a test can wait for. */
extern const char *const fabric_quick[];

long fabric_now_ms(void);
void fabric_sleep_ms(long ms);
/* Ranks of FABRIC_CASE. */
unsigned fabric_world_size(void);

/* moe_forward of the layer's inputs; f[FORWARD_COUNT] is filled. */
struct epd_plan *fabric_forward_plan(struct layer *layer, struct layer_tensor *f);
struct epd_plan *fabric_barrier_plan(struct layer *layer);
/* Some steps, all well. arg: the op case, or NULL for FABRIC_CASE. */
void fabric_healthy_rank(const struct rank *rank);
/* Launches far ahead of their ends. */
void fabric_ahead_rank(const struct rank *rank);
/* Steps until one fails; it must say whose fault it was, in time. arg: the name of the node. */
void fabric_until_lost_rank(const struct rank *rank);
/* What the node's control socket says. To be released. */
json_t *fabric_ask_document(const struct fabric_process *fabric, unsigned node, enum control_verb verb);
/* Until the group on the node is in the state ("joined", "open") and some of its steps, if it is open, have ended. */
void fabric_await_group(const struct fabric_process *fabric, unsigned node, const char *group,
                        const char *state);
/* The first n_kept ranks must end well, the others are ended. */
void fabric_ranks_end(const struct fabric_process *fabric, struct rank_team *team, unsigned n_kept);

#endif
