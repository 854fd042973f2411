/* What the flight recorder is told of a step, from its first request to its end. An entry that newer ones have
 * replaced is left alone. Loop thread. */
#ifndef EPD_DAEMON_STEP_RECORD_H
#define EPD_DAEMON_STEP_RECORD_H

#include "daemon/group.h"
#include "daemon/launch_queue.h"
#include "ep/step.h"

/* A step begins to gather with this launch; ordinal is 0 for a local op. Returns the serial of its entry. */
uint64_t step_record_begin(struct group *group, const struct launch *launch, uint64_t ordinal,
                           uint64_t now_ns);
/* This rank takes part in the step that the group gathers, as of gather.last_ns. */
void step_record_arrival(struct group *group, uint32_t rank);
/* Submitted to the lanes. */
void step_record_running(struct worker *worker, uint64_t serial, uint64_t now_ns);
/* Ended without running; rank is to blame, -1 if none. */
void step_record_failed(struct worker *worker, uint64_t serial, const struct epd_error *error,
                        enum epd_phase phase, int32_t rank, uint64_t now_ns);
/* Ended on the lanes. */
void step_record_result(struct worker *worker, uint64_t serial, const struct step_result *result,
                        uint64_t now_ns);

#endif
