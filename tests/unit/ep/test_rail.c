/* Rails of the host backend between processes, one of which dies while they meet: the other gets an error that names the
 * node, or nothing has happened to it, and it lives. Connections that both sides begin at once are the worst of it. */
#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ep/transport.h"
#include "tests/reference/values.h"

#define N_ROUNDS   60    /* EPD_TEST_ROUNDS overrides */
#define DEATH_US   3000u /* a victim dies within */
#define SWAPS      200
#define LIMIT_NS   5000000000ull
#define PART_BYTES 4096

static void want(int holds, const char *what, const struct epd_error *error)
{
    if (holds)
        return;
    fprintf(stderr, "rail: %s: %s\n", what, error ? error->text : "");
    _exit(2);
}

/* The kernel does it, wherever the process is. */
static void die_after_us(uint32_t us)
{
    struct sigevent how = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    const struct itimerspec when = {.it_value = {.tv_nsec = 1 + (long)us * 1000}};
    timer_t timer;
    want(timer_create(CLOCK_MONOTONIC, &how, &timer) == 0 && timer_settime(timer, 0, &when, NULL) == 0,
         "timer", NULL);
}

static void exchange(int fd, const void *send_bytes, void *receive_bytes, size_t bytes)
{
    want(send(fd, send_bytes, bytes, MSG_NOSIGNAL) == (ssize_t)bytes, "send", NULL);
    want(recv(fd, receive_bytes, bytes, MSG_WAITALL) == (ssize_t)bytes, "receive", NULL);
}

/* One end of a rail of two nodes, in a process of its own. death_us: 0 lives. Exits with 0 if all was as it must be. */
static void node_main(uint32_t node, int fd, uint32_t death_us)
{
    static uint8_t out[PART_BYTES], in[PART_BYTES];
    const struct transport_options options = {.ways = "tcp", .devices = ""};
    struct epd_error error = {0};
    struct transport_address addresses[2] = {0};
    struct transport_rail *rail;
    const struct transport *transport = transport_find(EPD_BACKEND_HOST, &error);
    want(transport != NULL, "transport", &error);
    want(transport->load(&options, &error) == EPD_OK, "load", &error);
    want(transport->rail_open(NULL, node, &rail, &addresses[node], &error) == EPD_OK, "open", &error);
    exchange(fd, &addresses[node], &addresses[1 - node], sizeof(addresses[0]));
    addresses[1 - node].node = 41 - node; /* as a fabric calls it */
    if (death_us)
        die_after_us(death_us);
    enum epd_status status = transport->rail_connect(rail, 2, node, addresses, LIMIT_NS, &error);
    while (status == EPD_OK && !transport->rail_connected(rail, &error))
        ;
    for (int i = 0; status == EPD_OK && i < SWAPS; i++) {
        struct transport_part parts[2] = {0};
        parts[1 - node] = (struct transport_part){
            .send = out, .send_bytes = sizeof(out), .receive = in, .receive_room = sizeof(in)};
        memset(out, (int)(2 * (uint32_t)i + node), sizeof(out));
        status = transport->rail_swap(rail, parts, &error);
        if (status == EPD_OK)
            want(parts[1 - node].received_bytes == sizeof(in) &&
                     in[PART_BYTES - 1] == (uint8_t)(2 * (uint32_t)i + 1 - node),
                 "what came is not what was sent", NULL);
    }
    if (status != EPD_OK) {
        char name[16];
        snprintf(name, sizeof(name), "node %u", 41 - node);
        want(status == EPD_PEER_LOST && strstr(error.text, name) != NULL,
             "another error than that of a lost peer", &error);
    }
    transport->rail_close(rail);
    _exit(0);
}

static pid_t start(uint32_t node, const int fds[2], uint32_t death_us)
{
    const pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        close(fds[1 - node]);
        node_main(node, fds[node], death_us);
    }
    return pid;
}

START_TEST(a_node_that_dies_while_rails_meet_costs_the_other_nothing)
{
    const char *given = getenv("EPD_TEST_ROUNDS");
    const int n_rounds = given ? atoi(given) : N_ROUNDS;
    uint64_t seed = 42 + (uint64_t)(given ? getpid() : 0);
    for (int round = 0; round < n_rounds; round++) {
        int fds[2], status[2];
        pid_t pids[2];
        const uint32_t victim = (uint32_t)(values_random(&seed) % 2);
        ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        for (uint32_t node = 0; node < 2; node++)
            pids[node] =
                start(node, fds, node == victim ? 1 + (uint32_t)(values_random(&seed) % DEATH_US) : 0);
        close(fds[0]);
        close(fds[1]);
        for (uint32_t node = 0; node < 2; node++)
            ck_assert_int_eq(waitpid(pids[node], &status[node], 0), pids[node]);
        ck_assert_msg(WIFEXITED(status[1 - victim]) && WEXITSTATUS(status[1 - victim]) == 0,
                      "round %d: the node that lives on ended with status 0x%x", round, status[1 - victim]);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("rail");
    TCase *tests = tcase_create("rail");
    tcase_set_timeout(tests, 0);
    tcase_add_test(tests, a_node_that_dies_while_rails_meet_costs_the_other_nothing);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
