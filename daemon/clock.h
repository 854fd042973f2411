/* Time as the daemon measures it: CLOCK_MONOTONIC, so that deadlines and durations survive a change of the
 * wall clock. */
#ifndef EPD_DAEMON_CLOCK_H
#define EPD_DAEMON_CLOCK_H

#include <stdint.h>
#include <time.h>

#define CLOCK_NS_PER_MS 1000000ull
#define CLOCK_NS_PER_S  1000000000ull
#define CLOCK_NEVER     UINT64_MAX

static inline uint64_t clock_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now); /* cannot fail for this clock */
    return (uint64_t)now.tv_sec * CLOCK_NS_PER_S + (uint64_t)now.tv_nsec;
}

static inline uint64_t clock_ms_to_ns(uint64_t ms)
{
    return ms * CLOCK_NS_PER_MS;
}

/* For timestamps that people read; never for a deadline. */
static inline uint64_t clock_unix_ms(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000u + (uint64_t)now.tv_nsec / CLOCK_NS_PER_MS;
}

#endif
