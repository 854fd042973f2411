/* The memory that one rank swaps with, and the swaps themselves: for each node a message there and one back, in both
 * directions. Owned by the team; lane thread of the rank. */
#ifndef EPD_EP_HOP_DESK_H
#define EPD_EP_HOP_DESK_H

#include "ep/hop.h"
#include "ep/hop_frame.h"
#include "kernels/host/host.h"

/* Tokens there: experts, weights, rows. Back: sums, scalars. What came there stays until the next swap there: the
 * rows are pushed out of it. */
enum hop_way { HOP_THERE, HOP_BACK, HOP_WAY_COUNT };

struct hop_line {
    void *out, *in;
    struct hop_frame sent, came;
};

struct hop_desk {
    struct backend_block block;
    uint64_t room[HOP_WAY_COUNT];          /* bytes of a message */
    struct hop_line *lines[HOP_WAY_COUNT]; /* [n_nodes], owned */
    float *own_sums, *own_scalars;         /* [max_tokens, H], [max_tokens, K] */
    int64_t *splits, *offsets;             /* [L], [L + 1]: of a rank that is not here */
    int64_t needed_rows, dropped_rows;     /* likewise */
    struct hop_verdict *verdicts;          /* [2 * n_nodes], owned */
    struct host_scratch scratch;
    uint64_t step;
    uint32_t n_swaps; /* of the step, so far */
    int off;          /* a swap has said that another rank is off */
};

/* Swaps the messages of one way that `sent` describes. n_due[n_nodes]: tokens that must come from each; NULL: any
 * number. Every later swap of the step is still to be taken if it fails. */
EPD_MUST_CHECK enum epd_status hop_desk_swap(const struct rank_run *run, enum hop_way way, uint32_t content,
                                             const uint32_t *n_due, struct epd_error *error);
/* Begins the messages of one way: n_tokens[n_nodes]. */
void hop_desk_begin(const struct rank_run *run, enum hop_way way, uint32_t content, const uint32_t *n_tokens);
struct hop_desk *hop_desk_of(const struct rank_run *run);

/* hop_desk.c's part of hop_form_host. */
EPD_MUST_CHECK enum epd_status hop_desk_create(struct team *team, uint32_t rank, struct epd_error *error);
void hop_desk_destroy(struct team *team, uint32_t rank);
void hop_desk_begin_step(const struct rank_run *runs, uint32_t n_runs, uint64_t step);
void hop_desk_drain(const struct rank_run *runs, uint32_t n_runs);
int hop_desk_only_followed(const struct rank_run *run);
void hop_desk_agree(const struct rank_run *runs, uint32_t n_runs, struct hop_verdict *verdict);

#endif
