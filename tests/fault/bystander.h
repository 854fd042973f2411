/* Two ranks that work while something else goes wrong, and must not notice: every step has to end EPD_OK with
 * the right result. Owned by the test; one thread. */
#ifndef EPD_TESTS_FAULT_BYSTANDER_H
#define EPD_TESTS_FAULT_BYSTANDER_H

#include <stdatomic.h>
#include <stdint.h>

#include "tests/integration/rank_process.h"

struct bystander_shared {
    atomic_int stop;
    atomic_ulong go;  /* steps that rank 0 has begun */
    atomic_ulong end; /* once rank 0 has stopped: how many there are */
};

struct bystander {
    struct rank_team team;
    struct bystander_shared *shared; /* owned, shared with the ranks */
};

/* Starts them and waits for their first step. */
void bystander_start(struct bystander *bystander, const char *socket_path);
/* Ends them; fails the test if a step had failed or none was made since the start. */
void bystander_stop(struct bystander *bystander);

#endif
