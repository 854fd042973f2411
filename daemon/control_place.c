#include "daemon/control_place.h"

#include <unistd.h>

#include "daemon/session.h"

/* Who holds the places, and who asks for one more. */
struct places {
    struct session *held[QUOTA_MAX_CONTROL];
    uint32_t n_held;
    uint32_t uid;
};

static void list_places(const struct worker *worker, struct places *places)
{
    list_each(node, after, &worker->sessions)
    {
        struct session *session = list_owner(node, struct session, in_worker);
        if (session->kind == SESSION_CONTROL && places->n_held < QUOTA_MAX_CONTROL)
            places->held[places->n_held++] = session;
    }
}

static uint32_t n_of_uid(const struct places *places, uint32_t uid)
{
    uint32_t n = uid == places->uid;
    for (uint32_t i = 0; i < places->n_held; i++)
        n += places->held[i]->peer.uid == uid;
    return n;
}

/* Nothing waits to be sent to it, and nothing is being written for it. */
static int is_idle(const struct session *session)
{
    return !session->first_output && session->n_holds == 1;
}

/* 1 if a should go rather than b, of the same right to stay. */
static int goes_before(const struct session *a, const struct session *b)
{
    if (!b || is_idle(a) != is_idle(b))
        return !b || is_idle(a);
    return a->active_ns < b->active_ns;
}

/* Of the uids that hold most. */
static struct session *of_the_most(const struct places *places)
{
    struct session *found = NULL;
    uint32_t most = 0;
    for (uint32_t i = 0; i < places->n_held; i++) {
        struct session *session = places->held[i];
        const uint32_t n = n_of_uid(places, session->peer.uid);
        if (n > most || (n == most && goes_before(session, found)))
            found = session;
        most = n > most ? n : most;
    }
    return found;
}

static struct session *of_others(const struct places *places)
{
    struct session *found = NULL;
    for (uint32_t i = 0; i < places->n_held; i++)
        if (places->held[i]->peer.uid != places->uid && goes_before(places->held[i], found))
            found = places->held[i];
    return found;
}

/* NULL: nobody. */
static struct session *who_goes(const struct places *places)
{
    struct session *session = of_the_most(places);
    if (session && (is_idle(session) || n_of_uid(places, session->peer.uid) > n_of_uid(places, places->uid)))
        return session;
    return places->uid == 0 || places->uid == geteuid() ? of_others(places) : NULL;
}

enum epd_status control_place_take(struct worker *worker, uint32_t uid, struct quota *quota,
                                   struct epd_error *error)
{
    if (worker->accounts.n_control >= QUOTA_MAX_CONTROL) {
        struct places places = {.uid = uid};
        list_places(worker, &places);
        struct session *session = who_goes(&places);
        if (session)
            session_close(session, CLOSE_CROWDED_OUT, NULL);
    }
    return quota_open_control(&worker->accounts, quota, error);
}
