#include "daemon/loop_watch.h"

#include "daemon/clock.h"

static uint64_t shorter(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t ask_every_ns(const struct loop_watch *watch)
{
    return shorter(clock_ms_to_ns(LOOP_WATCH_ASK_MS), watch->limit_ns / 4);
}

static uint64_t look_every_ns(const struct loop_watch *watch)
{
    return shorter(clock_ms_to_ns(LOOP_WATCH_LOOK_MS), watch->limit_ns / 16);
}

void loop_watch_start(struct loop_watch *watch, uint64_t limit_ms, uint64_t now_ns)
{
    *watch = (struct loop_watch){.limit_ns = clock_ms_to_ns(limit_ms)};
    watch->at_ns = limit_ms ? now_ns + ask_every_ns(watch) : CLOCK_NEVER;
}

void loop_watch_limit(struct loop_watch *watch, uint64_t limit_ms, uint64_t now_ns)
{
    if (clock_ms_to_ns(limit_ms) == watch->limit_ns)
        return;
    if (!limit_ms || !watch->looked_ns) {
        loop_watch_start(watch, limit_ms, now_ns);
        return;
    }
    watch->limit_ns = clock_ms_to_ns(limit_ms);
    watch->at_ns = now_ns;
}

enum loop_watch_word loop_watch_look(struct loop_watch *watch, uint64_t now_ns)
{
    if (now_ns < watch->at_ns)
        return LOOP_WATCH_FINE;
    const uint64_t slice_ns = look_every_ns(watch);
    /* Who comes late to the look did not run himself. */
    if (watch->looked_ns)
        watch->waited_ns += shorter(now_ns - watch->looked_ns, 2 * slice_ns);
    watch->looked_ns = now_ns;
    watch->at_ns = now_ns + slice_ns;
    if (watch->waited_ns >= watch->limit_ns)
        return LOOP_WATCH_STUCK;
    if (watch->waited_ns >= watch->limit_ns / 2 && !watch->suspected) {
        watch->suspected = 1;
        return LOOP_WATCH_SUSPECT;
    }
    return watch->asked ? LOOP_WATCH_FINE : LOOP_WATCH_ASK;
}

void loop_watch_asked(struct loop_watch *watch)
{
    watch->asked = 1;
}

void loop_watch_answered(struct loop_watch *watch, uint64_t now_ns)
{
    const uint64_t limit_ns = watch->limit_ns;
    loop_watch_start(watch, limit_ns / CLOCK_NS_PER_MS, now_ns);
}

void loop_watch_excuse(struct loop_watch *watch, uint64_t now_ns)
{
    if (watch->looked_ns)
        watch->looked_ns = now_ns;
}
