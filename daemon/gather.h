/* Gathers the launches of all ranks into steps. Per rank, launches of one group run in the order of the
 * calls; a local op is handed over when its turn comes, a collective op when the turn of every rank has come
 * to the same plan. Loop thread.
 *
 * Steps are matched by position: the n-th collective launch of every rank is step n. A step can end without
 * running - ranks disagree, a rank is missing at the deadline, a rank is lost - and then its number is used
 * up on every rank: a rank that comes to it late gets the error that the others got, and the next step
 * matches again. */
#ifndef EPD_DAEMON_GATHER_H
#define EPD_DAEMON_GATHER_H

#include "daemon/group.h"
#include "daemon/member.h"

struct span_step;

/* Something has arrived at the front of this rank's queue, or may be there. */
void gather_pump(struct member *member);
/* Looks at the deadlines of the step that is being gathered and at missing ranks; returns when to look again,
 * CLOCK_NEVER if there is nothing to wait for. May evict a session. */
uint64_t gather_check(struct group *group, uint64_t now_ns);
/* How long the step that is being gathered may wait for a rank before that is logged. */
uint64_t gather_warn_ms(const struct group *group);
/* The step that is being gathered, or would be next, ends without running; where nodes are spanned, when they have heard it. */
void gather_fail_step(struct group *group, const struct epd_error *error, int32_t rank);
/* Every queued collective launch ends with the group's `lost`. */
void gather_break(struct group *group);
/* Of a group that spans nodes (group_span.h), the oldest announced step: hands it over to the lanes, or ends it with the
 * error. 0 if the lanes have no room. A step that cannot be handed over breaks the group. */
int gather_resolve(struct group *group, const struct span_step *step, const struct epd_error *error,
                   int32_t rank);
/* The step that is being gathered, or would be next, has failed on other nodes. */
void gather_fail_unasked(struct group *group, const struct epd_error *error, int32_t rank);
/* Every rank's queue may go on. */
void gather_pump_all(struct group *group);
/* Lanes have room again: hands over what they refused. */
void gather_retry(struct worker *worker);

#endif
