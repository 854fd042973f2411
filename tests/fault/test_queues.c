/* A GPU has few queues (ep/node.h). No session and no uid takes those that others need; what it is refused is named and
 * counted, and what it held comes back. */
#include <check.h>
#include <string.h>

#include "tests/fault/baseline.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"

#define PER_SESSION "2"
#define PER_UID     "3"
#define SETTLE_MS   5000

static struct daemon_process epd_daemon;
static struct wire a, b; /* large */

static void start(void)
{
    daemon_start(
        &epd_daemon, 2,
        (const char *const[]){"--queues-per-session", PER_SESSION, "--queues-per-uid", PER_UID, NULL});
    wire_open(&a, epd_daemon.socket_path);
    wire_open(&b, epd_daemon.socket_path);
}

static void stop(void)
{
    wire_close(&a);
    wire_close(&b);
    daemon_stop(&epd_daemon);
}

static long long taken(size_t device)
{
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    const json_t *devices = json_object_get(json_object_get(status, "queues"), "devices");
    const long long n = json_integer_value(json_array_get(devices, device));
    ck_assert_uint_eq(json_array_size(devices), 2);
    json_decref(status);
    return n;
}

static void wait_until_taken(size_t device, long long want)
{
    for (int waited = 0; taken(device) != want; waited++) {
        ck_assert_msg(waited < SETTLE_MS, "device %zu: %lld taken, want %lld", device, taken(device), want);
        sleep_ms(1);
    }
}

static long long hits(void)
{
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    const long long n = control_number(status, "limits_hit.queues");
    json_decref(status);
    return n;
}

static void expect_refused(struct wire *wire, const char *group, const char *want)
{
    struct message join = wire_join_message(group, 1, 0);
    ck_assert_int_eq(wire_call(wire, &join, -1), EPD_QUOTA);
    ck_assert_msg(strstr(wire->why, want) != NULL, "got '%s', want '%s' in it", wire->why, want);
}

/* Groups of one rank lie on device 0. */
START_TEST(neither_a_session_nor_a_uid_takes_all_queues_of_a_device)
{
    (void)wire_join_alone(&a, "a1");
    const uint64_t second = wire_join_alone(&a, "a2");
    expect_refused(&a, "a3", "queues of device 0: groups of this session hold 2, 1 more wanted, at most 2");
    (void)wire_join_alone(&b, "b1");
    expect_refused(&b, "b2", "of uid");
    ck_assert_msg(strstr(b.why, "hold 3, 1 more wanted, at most 3 (queues_per_uid)") != NULL, "%s", b.why);
    ck_assert_int_eq(hits(), 2);
    ck_assert_int_eq(taken(0), 3);
    ck_assert_int_eq(taken(1), 0);
    struct message leave = wire_id_message(MESSAGE_GROUP_LEAVE, second);
    ck_assert_int_eq(wire_call(&a, &leave, -1), EPD_OK);
    wait_until_taken(0, 2);
    (void)wire_join_alone(&b, "b2");
    wire_close(&a);
    wire_close(&b);
    wait_until_taken(0, 0);
}
END_TEST

/* Joins both as ranks of a group of that many ranks; rank r lies on device r modulo 2. */
static uint64_t join_both(const char *group, uint32_t world_size, uint32_t rank_a, uint32_t rank_b)
{
    struct message first = wire_join_message(group, world_size, rank_a);
    struct message second = wire_join_message(group, world_size, rank_b);
    ck_assert_int_eq(wire_send(&a, &first, -1), 0);
    ck_assert_int_eq(wire_send(&b, &second, -1), 0);
    if (world_size > 2)
        return 0;
    ck_assert_int_eq(wire_answer(&a), EPD_OK);
    ck_assert_int_eq(wire_answer(&b), EPD_OK);
    return a.reply.reply_group.group_id;
}

START_TEST(what_the_ranks_of_a_group_share_counts_once)
{
    (void)join_both("shared", 4, 0, 2);
    wait_until_taken(0, 1);
    wire_close(&a);
    sleep_ms(50);
    ck_assert_int_eq(taken(0), 1); /* the other is there still */
    wire_close(&b);
    wait_until_taken(0, 0); /* it has never opened: nothing is left on the device */
}
END_TEST

START_TEST(a_queue_is_its_uids_until_the_group_is_gone)
{
    (void)join_both("kept", 2, 0, 1);
    ck_assert_int_eq(taken(0), 1);
    wire_close(&a);
    wire_open(&a, epd_daemon.socket_path);
    (void)wire_join_alone(&a, "next");
    ck_assert_int_eq(taken(0), 2); /* that of "kept" too, which has a rank */
    ck_assert_int_eq(taken(1), 1);
    wire_close(&b);
    wait_until_taken(0, 1);
    wait_until_taken(1, 0);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        neither_a_session_nor_a_uid_takes_all_queues_of_a_device,
        what_the_ranks_of_a_group_share_counts_once,
        a_queue_is_its_uids_until_the_group_is_gone,
    };
    return suite_run("queues", tests, SUITE_COUNT(tests), start, stop);
}
