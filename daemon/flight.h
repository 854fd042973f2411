/* A step on the lanes: submitted, and not yet heard of again. Pooled: a warm launch allocates nothing. Loop
 * thread. */
#ifndef EPD_DAEMON_FLIGHT_H
#define EPD_DAEMON_FLIGHT_H

#include "daemon/group.h"
#include "ep/step.h"

struct rank_plan;

struct flight {
    struct list in_idle;
    struct group *group; /* held */
    enum epd_op op;
    uint32_t n_plans;
    uint64_t n_tokens; /* of all ranks */
    uint64_t gather_ns, submit_ns;
    uint64_t entry;                              /* serial in the flight recorder */
    struct rank_plan *plans[EPD_MAX_WORLD_SIZE]; /* alive: ep lets go of a plan only after its steps */
};

/* From the pool, as it was left; NULL without memory. */
struct flight *flight_acquire(struct worker *worker);
/* Back to the pool: one that was not submitted. */
void flight_release(struct worker *worker, struct flight *flight);
/* It has been submitted: counted, recorded, and holding its group until it lands. */
void flight_depart(struct flight *flight, uint64_t now_ns);
/* The step_callback, arg is the flight: counts and records the result, lets go of the group, gives the flight
 * back to the pool. A lost device ends the worker. */
void flight_land(void *arg, const struct step_result *result);
/* Frees the pool. */
void flight_fini(struct worker *worker);

#endif
