/* Points in time of CLOCK_MONOTONIC in nanoseconds, as flag_wait takes them. No state; any thread. */
#ifndef EPD_CLIENT_DEADLINE_H
#define EPD_CLIENT_DEADLINE_H

#include <stdint.h>
#include <time.h>

#define DEADLINE_NEVER UINT64_MAX

uint64_t deadline_now_ns(void);
/* ms from now; DEADLINE_NEVER for 0. */
uint64_t deadline_after_ms(uint32_t ms);
/* Milliseconds left, rounded up; 0 once it has passed; INT32_MAX for DEADLINE_NEVER. */
uint32_t deadline_left_ms(uint64_t deadline_ns);
struct timespec deadline_timespec(uint64_t deadline_ns);

#endif
