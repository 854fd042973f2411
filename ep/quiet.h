/* A moment in which nothing runs or waits on any device of the node, and no lane puts anything in: for what makes CUDA wait
 * for whole devices, and holds up the calls of all lanes meanwhile. While lanes work such a moment may come by itself, and
 * is waited for without holding up anybody. Under constant load it does not: then the lanes stand still, all at the same
 * place in the order of their jobs, until their queues are empty or some ms have passed (ep/quiet.c says how long and how
 * often). So it fails to come only while something in a queue waits for a client, or runs, longer than that.
 *
 * Loop thread; see node.h. */
#ifndef EPD_EP_QUIET_H
#define EPD_EP_QUIET_H

#include "ep/node_impl.h"

struct quiet;

/* Made before it is needed, so that it comes whatever memory there is then. run: on every lane of the node at once, in that
 * moment, which lasts until all have ended; it is bounded by the caller, for every lane stands still. done: then, on the
 * loop thread. */
EPD_MUST_CHECK enum epd_status quiet_create(struct node *node, void (*run)(void *arg, struct lane *lane),
                                            void (*done)(void *arg), void *arg, struct quiet **quiet,
                                            struct epd_error *error);
/* Once; frees it behind done. */
void quiet_post(struct quiet *quiet);
/* Of one that was not posted. */
void quiet_destroy(struct quiet *quiet);

#endif
