/* The places of the control socket: few, and whoever holds one without using it makes room for who comes. So nobody, by
 * holding many, keeps others out. Loop thread. */
#ifndef EPD_DAEMON_CONTROL_PLACE_H
#define EPD_DAEMON_CONTROL_PLACE_H

#include <stdint.h>

#include "daemon/quota.h"

struct worker;

/* A place for one session of the uid. When all are taken, one of the uid that holds most (this one counted in) closes: the one
 * that has been idle for longest. A session that is being answered goes only for a uid that holds fewer places than its own,
 * or for root and the daemon's own uid. EPD_QUOTA: nobody is to go. */
EPD_MUST_CHECK enum epd_status control_place_take(struct worker *worker, uint32_t uid, struct quota *quota,
                                                  struct epd_error *error);

#endif
