#include "client/deadline.h"

#define NS_PER_S  1000000000u
#define NS_PER_MS 1000000u

uint64_t deadline_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint64_t deadline_after_ms(uint32_t ms)
{
    return ms ? deadline_now_ns() + (uint64_t)ms * NS_PER_MS : DEADLINE_NEVER;
}

uint32_t deadline_left_ms(uint64_t deadline_ns)
{
    uint64_t now_ns = deadline_now_ns();

    if (now_ns >= deadline_ns)
        return 0;
    uint64_t left_ms = (deadline_ns - now_ns - 1) / NS_PER_MS + 1;
    return left_ms < INT32_MAX ? (uint32_t)left_ms : INT32_MAX;
}

struct timespec deadline_timespec(uint64_t deadline_ns)
{
    return (struct timespec){.tv_sec = (time_t)(deadline_ns / NS_PER_S),
                             .tv_nsec = (long)(deadline_ns % NS_PER_S)};
}
