#include "tests/fault/undisturbed.h"

#include <check.h>
#include <stdlib.h>

#include "tests/fault/wire.h"

void undisturbed_open(struct undisturbed *here)
{
    const char *const quiet[] = {"--log-level", "warn", NULL};
    struct wire *wire = calloc(1, sizeof *wire); /* large */
    daemon_start(&here->daemon, 2, quiet);
    bystander_start(&here->bystander, here->daemon.socket_path);
    wire_open(wire, here->daemon.socket_path);
    (void)wire_join_alone(wire, "warm");
    wire_close(wire);
    free(wire);
    baseline_take(&here->before, &here->daemon);
}

void undisturbed_close(struct undisturbed *here)
{
    ck_assert_int_ge(baseline_wait(&here->before, &here->daemon), 0);
    bystander_stop(&here->bystander);
    daemon_stop(&here->daemon);
}
