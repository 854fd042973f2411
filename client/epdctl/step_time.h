/* Where the time of steps went, read from the stats document: waiting for the last rank, the phases that the lanes went through,
 * and what is left. Value type; pure. */
#ifndef EPD_EPDCTL_STEP_TIME_H
#define EPD_EPDCTL_STEP_TIME_H

#include <jansson.h>

#define STEP_TIME_MAX_PHASES 16
#define STEP_TIME_NAME_BYTES 24

struct step_time {
    double n_steps;
    double wait_ns; /* from the first rank's request to the last one's, all steps together */
    double run_ns;  /* from there to done */
    /* Parts of run_ns: of a mean rank in each phase. Nothing of them where the device works by itself (CUDA), which the host cannot see. */
    size_t n_phases;
    struct {
        char name[STEP_TIME_NAME_BYTES];
        double ns;
    } phases[STEP_TIME_MAX_PHASES];
};

/* Of one op, since the earlier object of the same op; since the start if before is NULL. */
void step_time_take(struct step_time *time, const json_t *op, const json_t *before);
/* time becomes the sum. */
void step_time_add(struct step_time *time, const struct step_time *more);
double step_time_total_ns(const struct step_time *time);
/* Of a phase; 0 if there is none of that name. */
double step_time_phase_ns(const struct step_time *time, const char *name);
/* What of run_ns is in no phase: lanes that waited, for each other or for a processor, or a device at work. */
double step_time_rest_ns(const struct step_time *time);

#endif
