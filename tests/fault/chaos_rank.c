#include "tests/fault/chaos.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "tests/fault/spawn.h"
#include "tests/fault/workload.h"
#include "tests/reference/values.h"

#define STEP_DEADLINE_MS 1500
#define RECOVER_MS       5000

struct chaos_actor {
    const struct chaos_role *role;
    struct chaos *chaos;
    struct chaos_team *team;
    struct chaos_rank *self;
    uint64_t seed, worker_loss_us;
    int forced; /* this loss of the worker has been counted */
};

static void move(struct chaos_actor *actor)
{
    atomic_store(&actor->self->alive_ms, chaos_now_us() / 1000);
}

/* What a fault somewhere in this run may do to a call of a rank that did nothing wrong. */
static int explained(enum epd_status status)
{
    switch (status) {
    case EPD_PEER_LOST:
    case EPD_TIMEOUT:
    case EPD_RESTARTED:
    case EPD_DISCONNECTED:
    case EPD_EVICTED:
    case EPD_DRAINING:
    case EPD_IN_USE:       /* the place in the group is still taken by the life before */
    case EPD_SEQ_MISMATCH: /* after a timeout one rank is a step ahead */
    case EPD_STALE_EPOCH:
        return 1;
    default:
        return 0;
    }
}

/* How long it took until this rank heard of the death of its peer, or of the worker. */
static void note_loss(struct chaos_actor *actor, enum epd_status status)
{
    if (status == EPD_PEER_LOST) {
        const uint64_t killed_us = atomic_exchange(&actor->team->noticing_us, 0);
        if (killed_us)
            chaos_sample(&actor->chaos->peer_notice, chaos_now_us() - killed_us);
    }
    if (status == EPD_RESTARTED) {
        const uint64_t killed_us = atomic_load(&actor->chaos->worker_killed_us);
        if (killed_us && killed_us != actor->worker_loss_us) {
            actor->worker_loss_us = killed_us;
            actor->forced = 1;
            chaos_sample(&actor->chaos->worker_notice, chaos_now_us() - killed_us);
        }
    }
}

static void note_end(struct chaos_actor *actor, enum epd_status status, const char *what)
{
    atomic_fetch_add(&actor->self->n_ended[status % CHAOS_N_STATUSES], 1);
    note_loss(actor, status);
    if (explained(status))
        return;
    atomic_fetch_add(&actor->chaos->n_unexpected, 1);
    fprintf(stderr, "team %u rank %u: %s ends %s: %s\n", actor->role->team, actor->role->rank, what,
            epd_status_name(status), epd_error_text());
}

static void note_good(struct chaos_actor *actor)
{
    atomic_fetch_add(&actor->self->n_good, 1);
    const uint64_t killed_us = atomic_exchange(&actor->team->killed_us, 0);
    if (killed_us)
        chaos_sample(&actor->chaos->peer_serve, chaos_now_us() - killed_us);
    if (actor->forced) {
        actor->forced = 0;
        chaos_sample(&actor->chaos->worker_serve, chaos_now_us() - actor->worker_loss_us);
    }
}

/* Steps until one fails, or the rank has had enough of it. */
static enum epd_status step_a_while(struct chaos_actor *actor, struct workload *w)
{
    const uint64_t n_steps = 1 + values_random(&actor->seed) % 2000;
    for (uint64_t i = 0; i < n_steps && !atomic_load(&actor->chaos->stop); i++) {
        move(actor);
        enum epd_status status = workload_step(w);
        if (status != EPD_OK)
            return status;
        note_good(actor);
        if (values_random(&actor->seed) % 64 == 0)
            sleep_ms((long)(values_random(&actor->seed) % 10));
    }
    return EPD_OK;
}

/* A lost worker is recovered from in place, or by starting over. 1 if the workload goes on. */
static int recover(struct chaos_actor *actor, struct workload *w, enum epd_status status)
{
    if (status != EPD_RESTARTED || values_random(&actor->seed) % 4 == 0)
        return 0;
    move(actor);
    status = epd_recover(w->layer.client, RECOVER_MS);
    if (status == EPD_OK)
        return 1;
    note_end(actor, status, "recover");
    return 0;
}

static void live_once(struct chaos_actor *actor, const struct rank *rank)
{
    struct workload w;
    move(actor);
    enum epd_status status = workload_try(&w, rank, &workload_case, STEP_DEADLINE_MS);
    if (status != EPD_OK) {
        note_end(actor, status, "open");
        sleep_ms(2);
        return;
    }
    do {
        status = step_a_while(actor, &w);
        if (status != EPD_OK)
            note_end(actor, status, "step");
    } while (recover(actor, &w, status));
    workload_close(&w);
}

void chaos_rank_run(const struct chaos_role *role)
{
    struct chaos_team *team = &role->chaos->teams[role->team];
    struct chaos_actor actor = {.role = role,
                                .chaos = role->chaos,
                                .team = team,
                                .self = &team->ranks[role->rank],
                                .seed = role->seed};
    char name[32];
    snprintf(name, sizeof name, "chaos-%u", role->team);
    const struct rank rank = {role->socket_path, name, CHAOS_RANKS, role->rank, NULL, 1};
    while (!atomic_load(&role->chaos->stop))
        live_once(&actor, &rank);
    exit(0);
}
