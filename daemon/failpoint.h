/* Places where a test makes the daemon fail on purpose. In builds without EPD_FAILPOINTS a failpoint is the
 * constant EPD_OK and costs nothing. With it, the environment of the daemon says what happens:
 *
 *   EPD_FAILPOINTS=name=action[@n],...   action: error | lost | sleep:MS | abort | kill; @n: only the n-th time the
 * place is met
 *
 * Loop thread. Places: session_open, hello_reply, group_open, buffer_ready, plan_ready, launch_received,
 * step_submit, step_done, worker_start, worker_open, drain, loop (each time the supervisor asks whether the loop comes round). */
#ifndef EPD_DAEMON_FAILPOINT_H
#define EPD_DAEMON_FAILPOINT_H

#include "proto/status.h"

#define FAILPOINT_MAX        16
#define FAILPOINT_NAME_BYTES 32

enum failpoint_action {
    FAILPOINT_NOTHING = 0,
    FAILPOINT_ERROR, /* the place gets EPD_SYSTEM */
    FAILPOINT_LOST,  /* the place gets EPD_CUDA, as from a device that is lost */
    FAILPOINT_SLEEP, /* the thread sleeps */
    FAILPOINT_ABORT, /* abort() */
    FAILPOINT_KILL,  /* SIGKILL to itself */
};

struct failpoint {
    char name[FAILPOINT_NAME_BYTES];
    enum failpoint_action action;
    uint32_t sleep_ms;
    uint64_t only_hit; /* 0: every time */
    uint64_t n_hits;
};

struct failpoints {
    uint32_t n_points;
    struct failpoint points[FAILPOINT_MAX];
};

/* text: value of EPD_FAILPOINTS or NULL. */
EPD_MUST_CHECK enum epd_status failpoint_parse(struct failpoints *failpoints, const char *text,
                                               struct epd_error *error);

#ifdef EPD_FAILPOINTS
/* EPD_OK, or what the actions `error` and `lost` give. */
EPD_MUST_CHECK enum epd_status failpoint_hit(struct failpoints *failpoints, const char *name,
                                             struct epd_error *error);
#else
#define failpoint_hit(failpoints, name, error) ((void)(failpoints), (void)(error), EPD_OK)
#endif

#endif
