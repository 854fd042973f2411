/* Prints how long a barrier of one rank, and of four ranks on four devices, takes from submit to done and to
 * the callback; asserts only that it works. */
#include <stdio.h>
#include <stdlib.h>

#include "ep/clock.h"
#include "tests/unit/ep/harness.h"

#define N_STEPS 2000

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void print(uint32_t n_ranks, const char *what, uint64_t *times_ns)
{
    qsort(times_ns, N_STEPS, sizeof *times_ns, compare);
    printf("{\"ranks\": %u, \"what\": \"%s\", \"steps\": %d, \"p50_us\": %.1f, \"p99_us\": %.1f}\n", n_ranks,
           what, N_STEPS, (double)times_ns[N_STEPS / 2] / 1e3, (double)times_ns[N_STEPS * 99 / 100] / 1e3);
}

static void time_barrier(uint32_t n_ranks)
{
    struct harness harness;
    struct crew crew;
    static struct draft drafts[HARNESS_MAX_RANKS];
    struct crew_plan plan;
    struct outcome outcome;
    const uint32_t no_tokens[HARNESS_MAX_RANKS] = {0};
    static uint64_t done_ns[N_STEPS], polled_ns[N_STEPS];
    const struct message_group_config config = {
        .n_experts = n_ranks,
        .top_k = 1,
        .hidden = 8,
        .max_tokens = 1,
        .alignment = 1,
        .dtype = EPD_F32,
        .overflow = EPD_OVERFLOW_ERROR,
    };
    harness_open(&harness, n_ranks, 0);
    crew_init(&crew, &harness, &config, n_ranks, 4096);
    for (uint32_t r = 0; r < n_ranks; r++)
        draft_init(&drafts[r], &crew, r, EPD_OP_BARRIER);
    crew_plan_create(&plan, &crew, drafts, n_ranks);
    for (int i = 0; i < N_STEPS; i++) {
        uint64_t begin_ns = clock_now_ns();
        launch(&plan, no_tokens, &outcome);
        polled_ns[i] = clock_now_ns() - begin_ns;
        done_ns[i] = outcome.ranks[0].end_ns - begin_ns;
        ck_assert_int_eq(outcome.ranks[0].status, EPD_OK);
    }
    print(n_ranks, "barrier, submit to done", done_ns);
    print(n_ranks, "barrier, submit to callback", polled_ns);
    crew_plan_destroy(&plan);
    crew_fini(&crew);
    harness_close(&harness);
}

START_TEST(barriers_are_timed)
{
    time_barrier(1);
    time_barrier(4);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {barriers_are_timed};
    return suite_run("ep latency", tests, 1);
}
