/* What every hostile client meets: a daemon with two ranks at work, which are not to notice, and the resources that it had before,
 * to which it has to go back. Owned by the test. */
#ifndef EPD_TESTS_FAULT_UNDISTURBED_H
#define EPD_TESTS_FAULT_UNDISTURBED_H

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/integration/daemon_process.h"

struct undisturbed {
    struct daemon_process daemon;
    struct bystander bystander;
    struct baseline before;
};

void undisturbed_open(struct undisturbed *here);
/* Checks both. */
void undisturbed_close(struct undisturbed *here);

#endif
