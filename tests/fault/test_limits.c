/* Clients that take too much: readers that never read, thousands of connections, the daemon's last fds,
 * quotas. The limit hits the one who exceeds it, is counted, and the daemon serves on. */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "daemon/log.h"
#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"

#define N_CONNECTS   10000
#define MAX_SESSIONS 300
#define N_HELD       600
#define SPARE_FDS    12
#define N_GREEDY     40
#define HEAP_LIMIT   (1024 * 1024) /* of a session: start() */

static struct daemon_process epd_daemon;
static struct bystander bystander;
static struct baseline before;
static struct wire wire; /* large */

static void start(void)
{
    const char *const limits[] = {"--log-level",
                                  "warn",
                                  "--sessions",
                                  "300",
                                  "--buffers-per-session",
                                  "8",
                                  "--plans-per-session",
                                  "4",
                                  "--groups-per-session",
                                  "3",
                                  "--heap-per-session",
                                  "1M",
                                  "--imported-per-session",
                                  "64K",
                                  NULL};
    daemon_start(&epd_daemon, 2, limits);
    bystander_start(&bystander, epd_daemon.socket_path);
    baseline_take(&before, &epd_daemon);
}

static void stop(void)
{
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}

static long long stat_of(const char *path)
{
    json_t *stats = control_ask(epd_daemon.control_path, CONTROL_STATS, NULL);
    long long value = control_number(stats, path);
    json_decref(stats);
    return value;
}

/* Asks and never reads, until the daemon hangs up. Blocking sends: the daemon does read. */
static void ask_and_never_read(struct message *question)
{
    int n = 0, fds_max = 0;
    wire_open(&wire, epd_daemon.socket_path);
    (void)wire_join_alone(&wire, "greedy");
    while (wire_send(&wire, question, -1) == 0) {
        ck_assert_msg(++n < 1000000, "the daemon takes everything");
        if (n % 100 == 0) {
            const int fds = process_fds(before.worker);
            fds_max = fds > fds_max ? fds : fds_max;
        }
    }
    wire_close(&wire);
    /* one client may not hold the fds that others need */
    ck_assert_msg(fds_max < before.fds + 512, "replies that nobody reads hold %d fds", fds_max - before.fds);
}

START_TEST(a_reader_that_never_reads_is_closed_and_counted)
{
    struct message unknown = wire_id_message(MESSAGE_PLAN_DESTROY, 12345), stats = {.kind = MESSAGE_STATS};
    ask_and_never_read(&unknown); /* small replies */
    ck_assert_int_eq(stat_of("sessions.closed.slow_reader"), 1);
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    ask_and_never_read(&stats); /* each with an fd and a document behind it */
    ck_assert_int_eq(stat_of("sessions.closed.slow_reader"), 2);
    ck_assert_int_eq(stat_of("limits_hit.output_bytes"), 2);
}
END_TEST

START_TEST(ten_thousand_connects_pass_by)
{
    for (int n = 0; n < N_CONNECTS / SANITIZER_FACTOR; n++) {
        ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
        wire_close(&wire);
    }
}
END_TEST

START_TEST(connections_over_the_limit_are_told_so_and_all_are_taken_again_afterwards)
{
    static struct wire *held[N_HELD];
    int n_refused = 0;
    for (int n = 0; n < N_HELD; n++) {
        held[n] = malloc(sizeof *held[n]);
        ck_assert_int_eq(wire_connect(held[n], epd_daemon.socket_path), 0);
        enum epd_status status = wire_hello(held[n]);
        ck_assert_msg(status == EPD_OK || status == EPD_QUOTA, "connection %d: %s", n, status_name(status));
        n_refused += status == EPD_QUOTA;
    }
    ck_assert_int_eq(n_refused, N_HELD - MAX_SESSIONS + 2); /* two are the bystanders' */
    for (int n = 0; n < N_HELD; n++) {
        wire_close(held[n]);
        free(held[n]);
    }
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    ck_assert_int_eq(stat_of("limits_hit.sessions"), n_refused);
    /* and not one log line for each */
    ck_assert_int_lt(file_count(epd_daemon.log_path, "connection refused"), LOG_BURST + 2);
    wire_open(&wire, epd_daemon.socket_path);
    wire_close(&wire);
}
END_TEST

START_TEST(out_of_fds_the_daemon_hangs_up_on_newcomers_and_goes_on_when_there_are_fds)
{
    static struct wire *greedy[N_GREEDY];
    struct rlimit old, few;
    int n_served = 0;
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, NULL, &old), 0);
    few = old;
    few.rlim_cur = (rlim_t)before.fds + SPARE_FDS;
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, &few, NULL), 0);
    for (int n = 0; n < N_GREEDY; n++) { /* nobody is left without an answer or an end */
        greedy[n] = malloc(sizeof *greedy[n]);
        ck_assert_int_eq(wire_connect(greedy[n], epd_daemon.socket_path), 0);
        enum epd_status status = wire_hello(greedy[n]);
        ck_assert_msg(status == EPD_OK || status == EPD_QUOTA || status == EPD_SYSTEM, "connection %d: %s", n,
                      status_name(status));
        n_served += status == EPD_OK;
    }
    ck_assert_int_gt(n_served, 0);
    ck_assert_int_lt(n_served, N_GREEDY);
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, &old, NULL), 0);
    for (int n = 0; n < N_GREEDY; n++) {
        wire_close(greedy[n]);
        free(greedy[n]);
    }
    wire_open(&wire, epd_daemon.socket_path); /* accept has resumed */
    wire_close(&wire);
}
END_TEST

/* People use up what is kept for them: whoever comes then is told, and does not wait for fds that nobody gives back. */
START_TEST(without_any_fd_left_who_comes_is_told_at_once)
{
    static struct wire *people[N_GREEDY];
    struct rlimit old, few;
    int n = 0, n_told = 0;
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, NULL, &old), 0);
    few = old;
    few.rlim_cur = (rlim_t)before.fds + SPARE_FDS;
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, &few, NULL), 0);
    for (; n < N_GREEDY && !n_told; n++) {
        people[n] = malloc(sizeof *people[n]);
        ck_assert_int_eq(wire_connect(people[n], epd_daemon.control_path), 0);
        (void)wire_receive(people[n], 300); /* an idle one hears nothing */
        n_told += people[n]->closed == EPD_QUOTA;
    }
    ck_assert_int_eq(n_told, 1);
    ck_assert_msg(strstr(people[n - 1]->why, "no fds left") != NULL, "%s", people[n - 1]->why);
    ck_assert_int_eq(prlimit(before.worker, RLIMIT_NOFILE, &old, NULL), 0);
    while (n--) {
        wire_close(people[n]);
        free(people[n]);
    }
}
END_TEST

/* Repeats a request until it is refused; returns after how many. */
static int repeat(struct message message, int fd, enum epd_status want)
{
    for (int n = 0; n < 100; n++) {
        enum epd_status status = wire_call(&wire, &message, fd);
        if (status == EPD_OK)
            continue;
        ck_assert_msg(status == want, "%s: %s", status_name(status), wire.why);
        return n;
    }
    ck_abort_msg("no limit");
}

START_TEST(every_quota_of_a_session_is_kept_named_and_counted)
{
    char name[8] = "a";
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "quota");
    ck_assert_int_eq(repeat(wire_barrier_message(group), -1, EPD_QUOTA), 4);
    ck_assert_msg(strstr(wire.why, "plans") && strstr(wire.why, "4"), "%s", wire.why);
    ck_assert_int_eq(repeat(wire_alloc_message(group, 4096), -1, EPD_QUOTA), 8);
    ck_assert_msg(strstr(wire.why, "buffers") && strstr(wire.why, "8"), "%s", wire.why);
    for (int n = 1; n < 3; n++, name[0]++)
        (void)wire_join_alone(&wire, name);
    struct message join = wire_join_message("z", 1, 0);
    ck_assert_int_eq(wire_call(&wire, &join, -1), EPD_QUOTA);
    wire_close(&wire);
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t large = wire_join_alone(&wire, "heap");
    ck_assert_int_eq(repeat(wire_alloc_message(large, 300 * 1024), -1, EPD_QUOTA), 3);
    ck_assert_msg(strstr(wire.why, "heap_bytes") != NULL, "%s", wire.why);
    wire_close(&wire);
    ck_assert_int_eq(stat_of("limits_hit.plans"), 1);
    ck_assert_int_eq(stat_of("limits_hit.buffers"), 1);
    ck_assert_int_eq(stat_of("limits_hit.groups"), 1);
    ck_assert_int_eq(stat_of("limits_hit.heap_bytes"), 1);
}
END_TEST

START_TEST(a_small_buffer_counts_as_what_it_takes)
{
    const long page = sysconf(_SC_PAGESIZE);
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "small");
    json_t *clients = control_ask(epd_daemon.control_path, CONTROL_CLIENTS, NULL);
    const long long others = control_sum(clients, "sessions", "heap_bytes");
    json_decref(clients);
    for (int n = 1; n <= 3; n++) {
        struct message alloc = wire_alloc_message(group, 1);
        ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_OK);
        clients = control_ask(epd_daemon.control_path, CONTROL_CLIENTS, NULL);
        ck_assert_int_eq(control_sum(clients, "sessions", "heap_bytes") - others, n * page);
        json_decref(clients);
    }
    wire_close(&wire);
}
END_TEST

static struct message_reply_plan make_plan(struct message_plan_create create, uint64_t buffer)
{
    for (size_t i = 0; i < create.n_bindings; i++)
        create.bindings[i].buffer_id = buffer;
    struct message message = {.kind = MESSAGE_PLAN_CREATE, .plan_create = create};
    ck_assert_msg(wire_call(&wire, &message, -1) == EPD_OK, "%s", wire.why);
    return wire.reply.reply_plan;
}

/* A dispatch over one buffer, and a combine of its rows over another. */
static void make_plans(uint64_t group, const uint64_t buffers[2], struct message_reply_plan plans[2])
{
    struct message_binding dispatch[] = {
        {.role = EPD_ROLE_X, .offset = 65536, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_RECV_X, .offset = 4096, .dtype = EPD_F32, .n_dims = 2, .shape = {64, 32}},
        {.role = EPD_ROLE_M_SPLITS, .offset = 2048, .dtype = EPD_I64, .n_dims = 1, .shape = {4}}};
    struct message_binding combine[] = {
        {.role = EPD_ROLE_Y, .dtype = EPD_F32, .n_dims = 2, .shape = {64, 32}},
        {.role = EPD_ROLE_OUT, .offset = 8192, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}}};
    struct message_plan_create create = {
        .group_id = group, .op = EPD_OP_DISPATCH, .n_bindings = 4, .bindings = dispatch};
    plans[0] = make_plan(create, buffers[0]);
    create = (struct message_plan_create){.group_id = group,
                                          .op = EPD_OP_COMBINE,
                                          .context_plan_id = plans[0].plan_id,
                                          .n_bindings = 2,
                                          .bindings = combine};
    plans[1] = make_plan(create, buffers[1]);
}

static uint64_t alloc_buffer(uint64_t group, uint64_t bytes)
{
    struct message alloc = wire_alloc_message(group, bytes);
    ck_assert_msg(wire_call(&wire, &alloc, -1) == EPD_OK, "%s", wire.why);
    return wire.reply.reply_buffer.buffer_id;
}

static void end_it(enum message_kind kind, uint64_t id)
{
    struct message message = wire_id_message(kind, id);
    ck_assert_msg(wire_call(&wire, &message, -1) == EPD_OK, "%s", wire.why);
}

/* The context of another plan stays, and with it the memory that it is bound to, though nobody can name them any more. */
START_TEST(memory_that_a_destroyed_plan_keeps_counts_until_it_is_gone)
{
    struct message_reply_plan plans[2];
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "keeps");
    const uint64_t buffers[] = {alloc_buffer(group, 700 * 1024), alloc_buffer(group, 16384)};
    make_plans(group, buffers, plans);
    end_it(MESSAGE_PLAN_DESTROY, plans[0].plan_id);
    end_it(MESSAGE_BUFFER_RELEASE, buffers[0]);
    struct message alloc = wire_alloc_message(group, 700 * 1024);
    ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_QUOTA);
    ck_assert_msg(strstr(wire.why, "heap_bytes") != NULL, "%s", wire.why);
    end_it(MESSAGE_PLAN_DESTROY, plans[1].plan_id);
    enum epd_status status = EPD_QUOTA;
    for (int waited = 0; status == EPD_QUOTA && waited < WIRE_DEADLINE_MS; waited++, sleep_ms(1)) {
        alloc = wire_alloc_message(group, 700 * 1024);
        status = wire_call(&wire, &alloc, -1);
    }
    ck_assert_msg(status == EPD_OK, "%s", wire.why);
    wire_close(&wire);
}
END_TEST

static long long heap_of_all(void)
{
    json_t *clients = control_ask(epd_daemon.control_path, CONTROL_CLIENTS, NULL);
    const long long bytes = control_sum(clients, "sessions", "heap_bytes");
    json_decref(clients);
    return bytes;
}

/* What plans hold on a device counts for who made them, as buffers do; and who holds more than it may gets no more of either,
 * until it gives something back. */
START_TEST(what_plans_hold_counts_for_who_made_them)
{
    struct message_reply_plan plans[2];
    wire_open(&wire, epd_daemon.socket_path);
    const long long before_all = heap_of_all();
    const uint64_t group = wire_join_alone(&wire, "plans");
    const uint64_t buffers[] = {alloc_buffer(group, 70 * 1024), alloc_buffer(group, 16384)};
    const long long before_plans = heap_of_all();
    make_plans(group, buffers, plans);
    const long long held = heap_of_all() - before_plans;
    ck_assert_int_gt(held, 0);
    const long long left = HEAP_LIMIT - (heap_of_all() - before_all);
    (void)alloc_buffer(group, (uint64_t)left / 4096 * 4096); /* fills it up */
    struct message alloc = wire_alloc_message(group, 4096);
    ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_QUOTA);
    ck_assert_msg(strstr(wire.why, "heap_bytes of this session") != NULL, "%s", wire.why);
    wire_close(&wire);
    for (int waited = 0; heap_of_all() != before_all; waited++, sleep_ms(1))
        ck_assert_int_lt(waited, WIRE_DEADLINE_MS);
}
END_TEST

/* There is room for less than the plan takes: it is refused when that is known, and works once there is room. */
START_TEST(a_plan_that_takes_more_than_its_session_may_is_refused)
{
    struct message_binding dispatch[] = {
        {.role = EPD_ROLE_X, .offset = 65536, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_RECV_X, .offset = 4096, .dtype = EPD_F32, .n_dims = 2, .shape = {64, 32}},
        {.role = EPD_ROLE_M_SPLITS, .offset = 2048, .dtype = EPD_I64, .n_dims = 1, .shape = {4}}};
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "full");
    const uint64_t buffer = alloc_buffer(group, 70 * 1024);
    const uint64_t filler = alloc_buffer(group, HEAP_LIMIT - 72 * 1024);
    for (int i = 0; i < 4; i++)
        dispatch[i].buffer_id = buffer;
    struct message plan = {
        .kind = MESSAGE_PLAN_CREATE,
        .plan_create = {.group_id = group, .op = EPD_OP_DISPATCH, .n_bindings = 4, .bindings = dispatch}};
    struct message same = plan;
    ck_assert_int_eq(wire_call(&wire, &plan, -1), EPD_QUOTA);
    ck_assert_msg(strstr(wire.why, "heap_bytes of this session") != NULL, "%s", wire.why);
    end_it(MESSAGE_BUFFER_RELEASE, filler);
    ck_assert_msg(wire_call(&wire, &same, -1) == EPD_OK, "%s", wire.why);
    wire_close(&wire);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_reader_that_never_reads_is_closed_and_counted,
        ten_thousand_connects_pass_by,
        connections_over_the_limit_are_told_so_and_all_are_taken_again_afterwards,
        out_of_fds_the_daemon_hangs_up_on_newcomers_and_goes_on_when_there_are_fds,
        without_any_fd_left_who_comes_is_told_at_once,
        every_quota_of_a_session_is_kept_named_and_counted,
        a_small_buffer_counts_as_what_it_takes,
        memory_that_a_destroyed_plan_keeps_counts_until_it_is_gone,
        what_plans_hold_counts_for_who_made_them,
        a_plan_that_takes_more_than_its_session_may_is_refused,
    };
    return suite_run("limits", tests, SUITE_COUNT(tests), start, stop);
}
