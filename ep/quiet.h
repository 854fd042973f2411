/* A moment in which nothing runs or waits on any device of the node, and no lane puts anything in: for what makes CUDA wait
 * for whole devices, and holds up the calls of all lanes meanwhile. Such a moment is waited for without holding up
 * anybody: under constant load it does not come. Loop thread; see node.h. */
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
