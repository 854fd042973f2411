/* Prints how long a step of one rank takes from submit to done and to the callback; asserts only that it
 * works. */
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

static void print(const char *what, uint64_t *times_ns)
{
    qsort(times_ns, N_STEPS, sizeof *times_ns, compare);
    printf("{\"what\": \"%s\", \"steps\": %d, \"p50_us\": %.1f, \"p99_us\": %.1f}\n", what, N_STEPS,
           (double)times_ns[N_STEPS / 2] / 1e3, (double)times_ns[N_STEPS * 99 / 100] / 1e3);
}

START_TEST(a_barrier_of_one_rank_is_timed)
{
    struct harness harness;
    struct crew crew;
    struct draft draft;
    struct crew_plan plan;
    struct outcome outcome;
    uint32_t no_tokens = 0;
    static uint64_t done_ns[N_STEPS], polled_ns[N_STEPS];
    const struct message_group_config config = {
        .n_experts = 1,
        .top_k = 1,
        .hidden = 8,
        .max_tokens = 1,
        .alignment = 1,
        .dtype = EPD_F32,
        .overflow = EPD_OVERFLOW_ERROR,
    };
    harness_open(&harness, 1, 0);
    crew_init(&crew, &harness, &config, 1, 4096);
    draft_init(&draft, &crew, 0, EPD_OP_BARRIER);
    crew_plan_create(&plan, &crew, &draft, 1);
    for (int i = 0; i < N_STEPS; i++) {
        uint64_t begin_ns = clock_now_ns();
        launch(&plan, &no_tokens, &outcome);
        polled_ns[i] = clock_now_ns() - begin_ns;
        done_ns[i] = outcome.ranks[0].end_ns - begin_ns;
        ck_assert_int_eq(outcome.ranks[0].status, EPD_OK);
    }
    print("barrier, submit to done", done_ns);
    print("barrier, submit to callback", polled_ns);
    crew_plan_destroy(&plan);
    crew_fini(&crew);
    harness_close(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {a_barrier_of_one_rank_is_timed};
    return suite_run("ep latency", tests, 1);
}
