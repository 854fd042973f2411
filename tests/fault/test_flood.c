/* Clients that keep to the protocol and ask for as much as it lets them: the others must not feel it. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/fault/baseline.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"

#define N_RANKS    2
#define N_LAUNCHES 1024 /* launches_per_rank: more are not read */
#define N_ASKERS   8
#define N_ASKED    60   /* replies with an fd that may wait in a socket: fewer than the daemon allows */
#define ANSWER_MS  1000 /* each of these floods held the loop for seconds; a busy machine alone takes 150 ms */
#define WATCH_MS   500

static struct daemon_process epd_daemon;

static void start(void)
{
    daemon_start(&epd_daemon, N_RANKS, NULL);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

/* Two ranks of one group with a barrier plan each. */
struct team {
    struct wire ranks[N_RANKS];
    struct message_reply_plan plans[N_RANKS];
    uint64_t group_id;
};

static void send_both(struct team *team, struct message *messages)
{
    for (int rank = 0; rank < N_RANKS; rank++)
        ck_assert_int_eq(wire_send(&team->ranks[rank], &messages[rank], -1), 0);
    for (int rank = 0; rank < N_RANKS; rank++)
        ck_assert_int_eq(wire_answer(&team->ranks[rank]), EPD_OK);
}

static void team_open(struct team *team, const char *name)
{
    struct message joins[N_RANKS], plans[N_RANKS];
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        wire_open(&team->ranks[rank], epd_daemon.socket_path);
        joins[rank] = wire_join_message(name, N_RANKS, rank);
    }
    send_both(team, joins);
    team->group_id = team->ranks[1].reply.reply_group.group_id;
    for (int rank = 0; rank < N_RANKS; rank++)
        plans[rank] = wire_barrier_message(team->ranks[rank].reply.reply_group.group_id);
    send_both(team, plans);
    for (int rank = 0; rank < N_RANKS; rank++)
        team->plans[rank] = team->ranks[rank].reply.reply_plan;
}

/* As many launches as the protocol and the limits allow. */
static void arm_all(struct wire *wire, const struct message_reply_plan *plan)
{
    struct message launch = {.kind = MESSAGE_LAUNCH,
                             .launch = {.plan_id = plan->plan_id,
                                        .seq = 1,
                                        .shape_hash = plan->shape_hash,
                                        .n_repeats = EPD_MAX_REPEATS}};
    ck_assert_int_eq(fcntl(wire->socket, F_SETFL, O_NONBLOCK), 0);
    int i = 0;
    for (int tries = 0; i < N_LAUNCHES && tries < 100;) {
        if (wire_send(wire, &launch, -1) == 0) {
            launch.launch.seq += EPD_MAX_REPEATS;
            i++;
            tries = 0;
        } else { /* it reads no more */
            ck_assert_msg(errno == EAGAIN, "launch %d: %s", i, strerror(errno));
            sleep_ms(1);
            tries++;
        }
    }
    ck_assert_int_gt((int64_t)i * EPD_MAX_REPEATS, 1000000);
}

/* For a while: everybody else is answered, in time. */
static void expect_answers(const char *during)
{
    const double begin = now_ms();
    double slowest = 0;
    while (now_ms() - begin < WATCH_MS) {
        double elapsed_ms;
        json_t *stats = control_ask(epd_daemon.control_path, CONTROL_STATS, &elapsed_ms);
        ck_assert_msg(stats != NULL, "%s: no answer after %.0f ms", during, elapsed_ms);
        json_decref(stats);
        slowest = elapsed_ms > slowest ? elapsed_ms : slowest;
        sleep_ms(1);
    }
    printf("%s: answered after at most %.1f ms\n", during, slowest);
    fflush(stdout);
    ck_assert_msg(slowest < ANSWER_MS * SANITIZER_FACTOR, "%s: answered after %.1f ms", during, slowest);
}

START_TEST(millions_of_armed_launches_whose_peer_dies_hold_up_nobody)
{
    static struct team team;
    team_open(&team, "armed");
    arm_all(&team.ranks[0], &team.plans[0]);
    wire_close(&team.ranks[1]);
    expect_answers("a peer of armed launches gone");
    wire_close(&team.ranks[0]);
    expect_answers("their own rank gone");
}
END_TEST

START_TEST(a_rank_that_dies_with_millions_of_armed_launches_holds_up_nobody)
{
    static struct team team;
    team_open(&team, "dying");
    arm_all(&team.ranks[0], &team.plans[0]);
    wire_close(&team.ranks[0]);
    expect_answers("a rank with armed launches gone");
    wire_close(&team.ranks[1]);
}
END_TEST

START_TEST(a_rank_that_leaves_with_millions_of_armed_launches_holds_up_nobody)
{
    static struct team team;
    team_open(&team, "leaving");
    const uint64_t group_id = team.group_id;
    arm_all(&team.ranks[0], &team.plans[0]);
    struct message leave = wire_id_message(MESSAGE_GROUP_LEAVE, group_id);
    (void)!wire_send(&team.ranks[1], &leave, -1);
    expect_answers("a peer of armed launches has left");
    ck_assert_int_eq(wire_answer(&team.ranks[1]), EPD_OK);
    for (int rank = 0; rank < N_RANKS; rank++)
        wire_close(&team.ranks[rank]);
}
END_TEST

/* Asks for documents as fast as they come, many at a time. */
static void ask_for_ever(void)
{
    static struct wire wire;
    struct message stats = {.kind = MESSAGE_STATS};
    wire_open(&wire, epd_daemon.socket_path);
    for (;;) {
        for (int i = 0; i < N_ASKED; i++)
            if (wire_send(&wire, &stats, -1) != 0)
                _exit(1);
        for (int i = 0; i < N_ASKED; i++)
            if (wire_receive(&wire, WIRE_DEADLINE_MS) != WIRE_MESSAGE)
                _exit(1);
    }
}

START_TEST(ranks_that_ask_for_documents_without_end_take_turns_with_the_others)
{
    pid_t askers[N_ASKERS];
    for (int i = 0; i < N_ASKERS; i++) {
        askers[i] = fork();
        if (askers[i] == 0)
            ask_for_ever();
    }
    sleep_ms(100);
    expect_answers("documents asked for without end");
    for (int i = 0; i < N_ASKERS; i++) {
        ck_assert_int_eq(waitpid(askers[i], NULL, WNOHANG), 0); /* it was answered all the time */
        kill(askers[i], SIGKILL);
        waitpid(askers[i], NULL, 0);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        millions_of_armed_launches_whose_peer_dies_hold_up_nobody,
        a_rank_that_dies_with_millions_of_armed_launches_holds_up_nobody,
        a_rank_that_leaves_with_millions_of_armed_launches_holds_up_nobody,
        ranks_that_ask_for_documents_without_end_take_turns_with_the_others,
    };
    return suite_run("flood", tests, SUITE_COUNT(tests), start, stop);
}
