/* What the processes of one chaos run share: the driver (chaos.c), its ranks (chaos_rank.c) and its scraper
 * (chaos_scraper.c). One anonymous shared mapping, made by the driver. */
#ifndef EPD_TESTS_FAULT_CHAOS_H
#define EPD_TESTS_FAULT_CHAOS_H

#include <stdatomic.h>
#include <stdint.h>

#define CHAOS_MAX_TEAMS   4
#define CHAOS_RANKS       2
#define CHAOS_N_STATUSES  64
#define CHAOS_MAX_SAMPLES 65536
/* A rank that is not stopped and has not moved for this long hangs. */
#define CHAOS_HANG_MS 40000

struct chaos_samples {
    atomic_uint n;
    uint32_t us[CHAOS_MAX_SAMPLES];
};

struct chaos_rank {
    atomic_ulong alive_ms; /* when it last did anything; 0: not running */
    atomic_uint life;      /* which of its lives, for seeds */
    atomic_ulong n_good;
    atomic_ulong n_ended[CHAOS_N_STATUSES]; /* calls that failed, by status */
};

struct chaos_team {
    struct chaos_rank ranks[CHAOS_RANKS];
    atomic_ulong killed_us;   /* when one of its ranks was killed; 0: nobody was, or it serves again */
    atomic_ulong noticing_us; /* the same, for the first one who is told */
};

struct chaos {
    atomic_int stop;
    atomic_ulong worker_killed_us;
    struct chaos_team teams[CHAOS_MAX_TEAMS];
    struct chaos_samples peer_notice, peer_serve, worker_notice, worker_serve, scrape;
    struct chaos_samples machine; /* what a sleep of 10 ms took more than that: nobody's fault */
    atomic_ulong n_scrapes, n_unanswered;
    atomic_int n_wrong;      /* EPD_OK and a wrong result */
    atomic_int n_unexpected; /* a status that no fault explains */
    atomic_int n_backwards;  /* counters of the stats that fell within one boot */
};

/* One rank, for ever: opens, joins, steps, recovers or starts over, until `stop`. Ends the process. */
struct chaos_role {
    struct chaos *chaos;
    const char *socket_path;
    unsigned team, rank;
    uint64_t seed;
};
void chaos_rank_run(const struct chaos_role *role) __attribute__((noreturn));
/* Asks for the stats every few milliseconds, until `stop`; an error counts as an answer too. Ends the process. */
void chaos_scraper_run(struct chaos *chaos, const char *control_path) __attribute__((noreturn));
/* Measures the machine meanwhile. Ends the process. */
void chaos_machine_run(struct chaos *chaos) __attribute__((noreturn));

uint64_t chaos_now_us(void);
void chaos_sample(struct chaos_samples *samples, uint64_t us);
/* The quantile 0..1 in milliseconds; 0 if there are none. Sorts the samples. */
double chaos_quantile_ms(struct chaos_samples *samples, double quantile);

#endif
