/* What tests of groups, buffers and plans begin with: a daemon that the test plays, a client and a group. Included once,
 * by a program with tests. */
#ifndef EPD_TESTS_UNIT_CLIENT_GROUP_FIXTURE_H
#define EPD_TESTS_UNIT_CLIENT_GROUP_FIXTURE_H

#include <check.h>
#include <stdlib.h>

#include "tests/unit/client/fake_daemon.h"

static struct fake fake;
static int n_fds;
static struct epd_client *client;
static struct epd_group *group;

static void setup(void)
{
    n_fds = count_fds();
    fake_open(&fake);
}

static void start(void (*script)(struct fake *daemon))
{
    fake_start(&fake, script);
    client = open_client(&fake);
    group = join_group(client);
}

static void teardown(void)
{
    epd_close(client);
    fake_stop(&fake);
    ck_assert_int_eq(count_fds(), n_fds);
}

static void script_must(int condition)
{
    if (!condition)
        abort();
}

#endif
