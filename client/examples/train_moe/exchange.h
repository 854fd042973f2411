/* How the processes of one training run meet outside epd: a piece of shared memory made by the launcher and
 * inherited by the ranks, with a barrier, room for every rank's gradients, and the list of losses. Sums are
 * made in rank order by every rank for itself, so all of them hold the same bits.
 *
 * Nobody waits for ever: when the launcher sees a rank end badly it calls exchange_abort, and every waiting
 * rank returns. */
#ifndef TRAIN_MOE_EXCHANGE_H
#define TRAIN_MOE_EXCHANGE_H

#include <stddef.h>

#include "settings.h"
#include <epd.h>

struct exchange_shared;

struct exchange {
    struct exchange_shared *shared; /* owned mapping */
    size_t shared_bytes;
    const struct settings *settings; /* borrowed, outlives this */
    size_t n_floats;                 /* in one rank's slot */
    uint32_t turn;                   /* exchanges made so far */
};

/* Launcher: makes the memory for gradients of n_floats; *fd is inherited by child processes. */
enum epd_status exchange_create(struct exchange *exchange, const struct settings *settings, size_t n_floats,
                                int *fd);
/* Rank: maps the launcher's memory. */
enum epd_status exchange_open(struct exchange *exchange, const struct settings *settings, size_t n_floats,
                              int fd);
void exchange_close(struct exchange *exchange);

/* Collective: values[n_floats] and *loss become the sums over all ranks. EPD_PEER_LOST after exchange_abort,
 * EPD_TIMEOUT when a rank does not come. */
enum epd_status exchange_sum(struct exchange *exchange, float *values, double *loss);
/* Collective: *all_well becomes whether every rank came with `well` set. Errors: as exchange_sum. */
enum epd_status exchange_vote(struct exchange *exchange, int well, int *all_well);
/* Any process: ends all waiting, now and later. */
void exchange_abort(struct exchange *exchange);

/* [n_steps] mean losses: of the run through epd, written by rank 0, and of the reference. */
double *exchange_losses(struct exchange *exchange);
double *exchange_reference_losses(struct exchange *exchange);

#endif
