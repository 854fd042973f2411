/* The launches that one rank has asked for and that have not been handed to the lanes: a ring that grows to
 * the limit and keeps its memory, so that a warm launch allocates nothing. Loop thread. */
#ifndef EPD_DAEMON_LAUNCH_QUEUE_H
#define EPD_DAEMON_LAUNCH_QUEUE_H

#include <stdint.h>

#include "proto/status.h"

struct rank_plan;

/* What is wrong with a launch; found on arrival, told when its turn comes, so that the other ranks hear of it
 * too. */
enum launch_flaw {
    LAUNCH_SOUND = 0,
    LAUNCH_BAD_SEQ,    /* not the number after the rank's last launch */
    LAUNCH_BAD_HASH,   /* not the hash that the plan's creation returned */
    LAUNCH_BAD_TOKENS, /* more tokens than the plan has */
};

struct launch {
    struct rank_plan *plan; /* borrowed; a plan with queued launches is not destroyed */
    uint64_t seq, wanted_seq;
    uint64_t arrived_ns;
    uint32_t n_tokens;
    uint32_t n_left; /* armed launches still to run, this one included */
    enum launch_flaw flaw;
};

struct launch_queue {
    struct launch *ring; /* owned, [capacity], capacity a power of two */
    uint32_t capacity, first, count;
    uint64_t n_launches; /* sum of n_left */
};

void launch_queue_fini(struct launch_queue *queue);
EPD_MUST_CHECK enum epd_status launch_queue_append(struct launch_queue *queue, const struct launch *launch,
                                                   struct epd_error *error);
/* NULL if empty. */
struct launch *launch_queue_first(struct launch_queue *queue);
/* i-th from the front, i < count. */
struct launch *launch_queue_at(struct launch_queue *queue, uint32_t i);
/* Takes one execution off the first launch; 1 if that was its last and the next launch is first now. */
int launch_queue_pop(struct launch_queue *queue);
/* Takes all that is left of the first launch; returns how many executions that were. */
uint32_t launch_queue_drop(struct launch_queue *queue);

#endif
