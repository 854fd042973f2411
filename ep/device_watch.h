/* Looks whether the devices still work, though nobody asks for anything: under MPS the fault of any process on a GPU ends the
 * worker's context there, and until the worker has ended no new client gets in. And whether the lanes still go on: one that
 * stands in a call which does not return serves nobody, and nobody would hear why. Loop thread; belongs to the worker. */
#ifndef EPD_EP_DEVICE_WATCH_H
#define EPD_EP_DEVICE_WATCH_H

#include "ep/node.h"

struct device_watch;

struct device_watch_rules {
    uint64_t slow_ns;  /* a lane that has not answered a look for so long is told of, once until it answers */
    uint64_t stuck_ns; /* and for so long: its device is lost; 0: never */
    /* doing: static words, what the lane is at. */
    void (*slow)(void *arg, uint32_t device_idx, uint64_t waited_ns, const char *doing);
    void (*lost)(void *arg, const struct epd_error *error); /* runs once */
    void *arg;
};

/* The node outlives the watch's last look. */
EPD_MUST_CHECK enum epd_status device_watch_create(struct node *node, const struct device_watch_rules *rules,
                                                   struct device_watch **watch, struct epd_error *error);
/* Of later looks. */
void device_watch_limits(struct device_watch *watch, uint64_t slow_ns, uint64_t stuck_ns);
/* To be called at least every second. Asks every lane that has answered the last time, and judges those that have not. */
void device_watch_look(struct device_watch *watch);
/* After node_close: no look is under way. NULL is legal. */
void device_watch_destroy(struct device_watch *watch);

#endif
