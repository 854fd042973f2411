/* Sleeping on a 32-bit word between threads of this process. The words that processes share are flags
 * (proto/page.h). */
#ifndef EPD_EP_FUTEX_H
#define EPD_EP_FUTEX_H

#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Returns when the word no longer holds value, after the timeout (NULL: none), or for no reason: callers look
 * again. */
static inline void futex_wait(_Atomic uint32_t *word, uint32_t value, const struct timespec *timeout)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout, NULL, 0);
}

static inline void futex_wake_all(_Atomic uint32_t *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* A pause of a spinning thread: tens of nanoseconds. */
static inline void futex_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
