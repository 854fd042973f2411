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

/* Something has arrived at the front of this rank's queue, or may be there. */
void gather_pump(struct member *member);
/* Looks at the deadlines of the step that is being gathered and at missing ranks; returns when to look again,
 * CLOCK_NEVER if there is nothing to wait for. May evict a session. */
uint64_t gather_check(struct group *group, uint64_t now_ns);
/* Every queued collective launch ends with the group's `lost`. */
void gather_break(struct group *group);
/* Lanes have room again: hands over what they refused. */
void gather_retry(struct worker *worker);

#endif
