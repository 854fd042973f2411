/* Host cost of a launch. "launch": the time inside epd_plan_launch, which wakes a daemon thread that sleeps
 * in recvmsg, and the whole trip until epd_plan_wait returns. "send": the same message to a daemon that is
 * busy, so that nobody is woken: what the library, the codec and the system call cost by themselves. Prints
 * one JSON line. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/group.h"
#include "tests/unit/client/fake_daemon.h"

#define N_LAUNCHES 20000
#define N_BATCHES  100
#define N_BATCH    100 /* fits into the socket */

static void script(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, 0);
    for (int i = 0; i < N_LAUNCHES; i++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        fake_complete(daemon, 0);
    }
    for (int i = 0; i < N_BATCHES; i++) {
        usleep(2000); /* the client sends now */
        for (int j = 0; j < N_BATCH; j++)
            fake_expect(daemon, MESSAGE_LAUNCH);
        fake_expect(daemon, MESSAGE_STATS);
        fake_answer_error(daemon, EPD_UNSUPPORTED, "next batch");
    }
}

/* Mean of one batch. */
static uint64_t send_batch(struct epd_client *client, struct epd_group *group)
{
    struct message_launch launch = {.plan_id = 101, .n_repeats = 1, .n_tokens = 4096, .shape_hash = 1};
    struct epd_error error;
    char *json;

    uint64_t start_ns = deadline_now_ns();
    for (int i = 0; i < N_BATCH; i++)
        if (connection_launch(group->connection, &launch, &group->last_seq, &error))
            abort();
    uint64_t mean_ns = (deadline_now_ns() - start_ns) / N_BATCH;
    if (epd_stats(client, &json) != EPD_UNSUPPORTED)
        abort();
    return mean_ns;
}

static int compare(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return (left > right) - (left < right);
}

int main(void)
{
    static struct fake fake;
    static uint64_t launch_ns[N_LAUNCHES], trip_ns[N_LAUNCHES], send_ns[N_BATCHES];

    fake_open(&fake);
    fake_start(&fake, script);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    struct epd_plan *plan = create_barrier(group);
    for (int i = 0; i < N_LAUNCHES; i++) {
        uint64_t start_ns = deadline_now_ns();
        if (epd_plan_launch(plan, NULL))
            abort();
        launch_ns[i] = deadline_now_ns() - start_ns;
        if (epd_plan_wait(plan, 0))
            abort();
        trip_ns[i] = deadline_now_ns() - start_ns;
    }
    for (int i = 0; i < N_BATCHES; i++)
        send_ns[i] = send_batch(client, group);
    epd_close(client);
    fake_stop(&fake);
    qsort(launch_ns, N_LAUNCHES, sizeof launch_ns[0], compare);
    qsort(trip_ns, N_LAUNCHES, sizeof trip_ns[0], compare);
    printf(
        "{\"case\": \"client_launch\", \"launches\": %d, \"launch_ns_p50\": %llu, \"launch_ns_p99\": %llu, "
        "\"trip_ns_p50\": %llu, \"trip_ns_p99\": %llu, \"send_ns_p50\": %llu}\n",
        N_LAUNCHES, (unsigned long long)launch_ns[N_LAUNCHES / 2],
        (unsigned long long)launch_ns[N_LAUNCHES / 100 * 99], (unsigned long long)trip_ns[N_LAUNCHES / 2],
        (unsigned long long)trip_ns[N_LAUNCHES / 100 * 99], (unsigned long long)send_ns[N_BATCHES / 2]);
    return 0;
}
