/* Looks whether the devices still work, though nobody asks for anything: under MPS the fault of any process on a GPU ends the
 * worker's context there, and until the worker has ended no new client gets in. Loop thread; belongs to the worker. */
#ifndef EPD_EP_DEVICE_WATCH_H
#define EPD_EP_DEVICE_WATCH_H

#include "ep/node.h"

struct device_watch;

/* lost runs once, on the loop thread. The node outlives the watch's last look. */
EPD_MUST_CHECK enum epd_status device_watch_create(struct node *node,
                                                   void (*lost)(void *arg, const struct epd_error *error),
                                                   void *arg, struct device_watch **watch,
                                                   struct epd_error *error);
/* Asks every lane that has answered the last time. */
void device_watch_look(struct device_watch *watch);
/* After node_close: no look is under way. NULL is legal. */
void device_watch_destroy(struct device_watch *watch);

#endif
