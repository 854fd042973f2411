#include "tests/fault/chaos.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fault/control.h"
#include "tests/fault/spawn.h"

#define SCRAPE_PAUSE_MS  20
#define MACHINE_SLEEP_MS 10
#define N_COUNTERS       10

static const char *const counters[N_COUNTERS] = {
    "sessions.opened",           "sessions.refused", "sessions.closed.client", "sessions.closed.evicted",
    "sessions.closed.bad_frame", "requests.hello",   "requests.group_join",    "requests.plan_create",
    "requests.launch",           "requests.control"};

struct scraper {
    char boot_id[64];
    long long values[N_COUNTERS], launches;
};

/* Counters only grow within one boot. */
static void compare(struct scraper *scraper, const json_t *stats, struct chaos *chaos)
{
    const char *boot_id = json_string_value(json_object_get(stats, "boot_id"));
    if (boot_id && strcmp(boot_id, scraper->boot_id) != 0) {
        memset(scraper, 0, sizeof *scraper);
        snprintf(scraper->boot_id, sizeof scraper->boot_id, "%s", boot_id);
    }
    for (int i = 0; i <= N_COUNTERS; i++) {
        const char *name = i < N_COUNTERS ? counters[i] : "ops launches";
        long long *last = i < N_COUNTERS ? &scraper->values[i] : &scraper->launches;
        const long long value =
            i < N_COUNTERS ? control_number(stats, counters[i]) : control_sum(stats, "ops", "launches");
        if (value < *last) {
            atomic_fetch_add(&chaos->n_backwards, 1);
            fprintf(stderr, "counter %s fell from %lld to %lld\n", name, *last, value);
        }
        *last = value;
    }
}

void chaos_scraper_run(struct chaos *chaos, const char *control_path)
{
    struct scraper scraper = {0};
    while (!atomic_load(&chaos->stop)) {
        double elapsed_ms;
        json_t *stats = control_ask(control_path, CONTROL_STATS, &elapsed_ms);
        atomic_fetch_add(stats ? &chaos->n_scrapes : &chaos->n_unanswered, 1);
        chaos_sample(&chaos->scrape, (uint64_t)(elapsed_ms * 1e3));
        if (stats)
            compare(&scraper, stats, chaos);
        json_decref(stats);
        sleep_ms(SCRAPE_PAUSE_MS);
    }
    exit(0);
}

void chaos_machine_run(struct chaos *chaos)
{
    while (!atomic_load(&chaos->stop)) {
        const uint64_t begin_us = chaos_now_us();
        sleep_ms(MACHINE_SLEEP_MS);
        chaos_sample(&chaos->machine, chaos_now_us() - begin_us - MACHINE_SLEEP_MS * 1000);
    }
    exit(0);
}
