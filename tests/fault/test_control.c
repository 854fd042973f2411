/* The control socket while the daemon has something long to do. */
#include <check.h>
#include <poll.h>
#include <stdlib.h>

#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/integration/daemon_process.h"

#define N_OPS   2100 /* more than the flight recorder holds */
#define N_TRIES 20

static struct daemon_process epd_daemon;

static void start(void)
{
    daemon_start(&epd_daemon, 2, NULL);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

static void fill_recorder(void)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    struct message barrier = wire_barrier_message(wire_join_alone(&wire, "filler"));
    ck_assert_int_eq(wire_call(&wire, &barrier, -1), EPD_OK);
    const struct message_reply_plan plan = wire.reply.reply_plan;
    for (int i = 0; i < N_OPS; i++) {
        ck_assert_int_eq(wire_launch(&wire, &plan, 1), 0);
        ck_assert_int_eq(wire_done(&wire, &plan), EPD_OK);
    }
    wire_close(&wire);
}

static int has_answer(const struct wire *wire)
{
    struct pollfd poll_fd = {.fd = wire->socket, .events = POLLIN};
    return poll(&poll_fd, 1, 0) == 1;
}

/* A dump is a megabyte of JSON: who asks for something else meanwhile is answered first. */
START_TEST(a_dump_of_a_full_recorder_keeps_nobody_waiting)
{
    static struct wire dumper;
    int n_overtaken = 0;
    fill_recorder();
    for (int i = 0; i < N_TRIES && !n_overtaken; i++) {
        struct message dump = {.kind = MESSAGE_CONTROL, .control = {.verb = CONTROL_DUMP}};
        ck_assert_int_eq(wire_connect(&dumper, epd_daemon.control_path), 0);
        ck_assert_int_eq(wire_send(&dumper, &dump, -1), 0);
        sleep_ms(2); /* the daemon has begun it */
        json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
        ck_assert_ptr_nonnull(status);
        json_decref(status);
        n_overtaken += !has_answer(&dumper);
        ck_assert_int_eq(wire_receive(&dumper, WIRE_DEADLINE_MS), WIRE_MESSAGE);
        ck_assert_int_eq(dumper.reply.kind, MESSAGE_REPLY_DOCUMENT);
        ck_assert_uint_gt(dumper.reply.reply_document.bytes, 400000);
        wire_close(&dumper);
    }
    ck_assert_int_gt(n_overtaken, 0);
}
END_TEST

/* Who asks for many at once is told that they are too many; who hangs up in the middle leaves nothing. */
START_TEST(dumps_are_limited_and_may_lose_their_asker)
{
    static struct wire dumper;
    int n_documents = 0, n_busy = 0;
    fill_recorder();
    for (int round = 0; round < 3; round++) {
        json_t *document = NULL;
        while (round == 2 && !(document = control_ask(epd_daemon.control_path, CONTROL_DUMP, NULL)))
            sleep_ms(1); /* until those of the rounds before have ended */
        json_decref(document);
        ck_assert_int_eq(wire_connect(&dumper, epd_daemon.control_path), 0);
        for (int i = 0; i < 12; i++) {
            struct message dump = {.kind = MESSAGE_CONTROL, .control = {.verb = CONTROL_DUMP}};
            ck_assert_int_eq(wire_send(&dumper, &dump, -1), 0);
        }
        for (int i = 0; i < 12 && round == 2; i++) {
            ck_assert_int_eq(wire_receive(&dumper, WIRE_DEADLINE_MS), WIRE_MESSAGE);
            n_documents += dumper.reply.kind == MESSAGE_REPLY_DOCUMENT;
            n_busy += dumper.reply.kind == MESSAGE_REPLY_ERROR && dumper.reply.reply_error.status == EPD_BUSY;
        }
        wire_close(&dumper);
    }
    ck_assert_int_eq(n_documents + n_busy, 12);
    ck_assert(n_documents > 0 && n_busy > 0);
}
END_TEST

static uint64_t bytes_of_stats(struct wire *wire)
{
    struct message stats = {.kind = MESSAGE_STATS};
    ck_assert_int_eq(wire_call(wire, &stats, -1), EPD_OK);
    return wire->reply.reply_document.bytes;
}

/* The rows of each of 65536 experts, of groups that the asker is not in. */
START_TEST(what_a_rank_asks_for_does_not_grow_with_the_groups_of_others)
{
    static struct wire wide, asker;
    wire_open(&wide, epd_daemon.socket_path);
    wire_open(&asker, epd_daemon.socket_path);
    const uint64_t before = bytes_of_stats(&asker);
    for (char name[] = "a"; name[0] < 'a' + 8; name[0]++) {
        struct message join = wire_join_message(name, EPD_MAX_WORLD_SIZE, 0);
        join.group_join.config.n_experts = EPD_MAX_LOCAL_EXPERTS * EPD_MAX_WORLD_SIZE;
        ck_assert_int_eq(wire_send(&wide, &join, -1), 0);
    }
    const uint64_t own = bytes_of_stats(&wide), now = bytes_of_stats(&asker);
    ck_assert_msg(now < before + 8 * 1024, "%lu bytes, %lu before", (unsigned long)now,
                  (unsigned long)before);
    ck_assert_uint_gt(own, 8ul * 65536);
    wire_close(&wide);
    wire_close(&asker);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_dump_of_a_full_recorder_keeps_nobody_waiting,
        dumps_are_limited_and_may_lose_their_asker,
        what_a_rank_asks_for_does_not_grow_with_the_groups_of_others,
    };
    return suite_run("control", tests, SUITE_COUNT(tests), start, stop);
}
