#include "proto/page.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* With these nobody can shrink the memory under the other side's mapping (SIGBUS) or lift the seals. */
#define PAGE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* How often flag_wait looks before it sleeps: about 2000 cycles at 80 per pause (measured; other processors
 * take 40 to 140). A sleep and wake-up costs more than that; a longer spin would take the core from the
 * process that is to set the flag. */
#define FLAG_SPINS 25

_Static_assert(offsetof(struct page, plans) == 64, "the header keeps its size on the wire");
_Static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t), "a flag is a futex word");

static enum epd_status page_map(int fd, struct page **page, struct epd_error *error)
{
    void *memory = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (memory == MAP_FAILED)
        return error_set(error, EPD_SYSTEM, "session page: mmap: %s", strerror(errno));
    *page = memory;
    return EPD_OK;
}

enum epd_status page_create(struct page **page, int *fd, struct epd_error *error)
{
    struct page *created = NULL;
    int memory_fd = memfd_create("epd-session-page", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (memory_fd < 0)
        return error_set(error, EPD_SYSTEM, "session page: memfd_create: %s", strerror(errno));
    /* Takes the memory now: a full tmpfs is an error here and not a SIGBUS at the first store. */
    int failed = posix_fallocate(memory_fd, 0, sizeof *created);
    if (failed) {
        error_set(error, EPD_NO_MEMORY, "session page: %zu bytes: %s", sizeof *created, strerror(failed));
        goto close_fd;
    }
    if (fcntl(memory_fd, F_ADD_SEALS, PAGE_SEALS) < 0) {
        error_set(error, EPD_SYSTEM, "session page: seals: %s", strerror(errno));
        goto close_fd;
    }
    if (page_map(memory_fd, &created, error))
        goto close_fd;
    created->magic = EPD_PAGE_MAGIC;
    created->version = EPD_PAGE_VERSION;
    created->max_plans = EPD_PAGE_MAX_PLANS;
    created->ring_entries = EPD_PAGE_RING_ENTRIES;
    *page = created;
    *fd = memory_fd;
    return EPD_OK;

close_fd:
    close(memory_fd);
    return error->status;
}

static enum epd_status page_check_file(int fd, uint64_t bytes, struct epd_error *error)
{
    struct stat file;
    int seals = fcntl(fd, F_GET_SEALS);

    if (seals < 0)
        return error_set(error, EPD_PROTOCOL, "session page: not a memfd: %s", strerror(errno));
    if ((seals & PAGE_SEALS) != PAGE_SEALS || (seals & F_SEAL_WRITE))
        return error_set(error, EPD_PROTOCOL, "session page: seals 0x%x, want 0x%x (shrink, grow, seal)",
                         (unsigned)seals, (unsigned)PAGE_SEALS);
    if (fstat(fd, &file) < 0)
        return error_set(error, EPD_SYSTEM, "session page: fstat: %s", strerror(errno));
    if (bytes != sizeof(struct page) || file.st_size != (off_t)sizeof(struct page))
        return error_set(error, EPD_PROTOCOL,
                         "session page: %llu bytes announced, %lld in the file, want %zu",
                         (unsigned long long)bytes, (long long)file.st_size, sizeof(struct page));
    return EPD_OK;
}

enum epd_status page_open(int fd, uint64_t bytes, struct page **page, struct epd_error *error)
{
    struct page *opened = NULL;

    if (page_check_file(fd, bytes, error) || page_map(fd, &opened, error))
        return error->status;
    if (opened->magic != EPD_PAGE_MAGIC || opened->version != EPD_PAGE_VERSION ||
        opened->max_plans != EPD_PAGE_MAX_PLANS || opened->ring_entries != EPD_PAGE_RING_ENTRIES) {
        error_set(error, EPD_VERSION_MISMATCH,
                  "session page: magic 0x%x version %u plans %u ring %u, want 0x%x %u %u %u", opened->magic,
                  opened->version, opened->max_plans, opened->ring_entries, EPD_PAGE_MAGIC, EPD_PAGE_VERSION,
                  EPD_PAGE_MAX_PLANS, EPD_PAGE_RING_ENTRIES);
        page_close(opened);
        return error->status;
    }
    *page = opened;
    return EPD_OK;
}

void page_close(struct page *page)
{
    if (page)
        munmap(page, sizeof *page);
}

/* Entries cross process borders while the other side may be at work on them, so they are copied word by word
 * with atomic accesses, and the stamp tells whether what was read is one whole entry. */
#define ENTRY_WORDS (sizeof(struct page_entry) / sizeof(uint64_t))
typedef uint64_t __attribute__((may_alias)) entry_word;

static uint32_t stamp_of(uint64_t idx)
{
    return (uint32_t)(idx + 1); /* 0 is "being written" or "never written" */
}

/* Several lanes and the loop may report into one page: each takes its own place in the ring by write_idx. */
void page_report(struct page *page, const struct page_entry *entry)
{
    struct page_entry copy = *entry;
    copy.stamp = 0;
    copy.text[sizeof copy.text - 1] = 0;
    uint64_t words[ENTRY_WORDS];
    memcpy(words, &copy, sizeof words);

    /* The client can write write_idx too; whatever it holds, the place is inside the ring. */
    uint64_t idx = atomic_fetch_add_explicit(&page->write_idx, 1, memory_order_relaxed);
    struct page_entry *slot = &page->ring[idx % EPD_PAGE_RING_ENTRIES];
    atomic_store_explicit(&slot->stamp, 0, memory_order_relaxed);
    entry_word *target = (entry_word *)slot;
    for (size_t i = 0; i < ENTRY_WORDS; i++)
        __atomic_store_n(&target[i], words[i], __ATOMIC_RELEASE);
    atomic_store_explicit(&slot->stamp, stamp_of(idx), memory_order_release);
}

/* 1 and *entry if the whole of entry idx could be read. */
static int page_read(struct page *page, uint64_t idx, struct page_entry *entry)
{
    struct page_entry *slot = &page->ring[idx % EPD_PAGE_RING_ENTRIES];
    uint64_t words[ENTRY_WORDS];

    if (atomic_load_explicit(&slot->stamp, memory_order_acquire) != stamp_of(idx))
        return 0;
    const entry_word *source = (const entry_word *)slot;
    for (size_t i = 0; i < ENTRY_WORDS; i++)
        words[i] = __atomic_load_n(&source[i], __ATOMIC_ACQUIRE);
    if (atomic_load_explicit(&slot->stamp, memory_order_relaxed) != stamp_of(idx))
        return 0;
    memcpy(entry, words, sizeof words);
    entry->text[sizeof entry->text - 1] = 0;
    return 1;
}

int page_take(struct page *page, uint64_t plan_id, uint64_t *seen_idx, struct page_entry *entry)
{
    uint64_t end = atomic_load_explicit(&page->write_idx, memory_order_acquire);
    uint64_t first = *seen_idx;
    int found = 0;

    if (end - first > EPD_PAGE_RING_ENTRIES)
        first = end - EPD_PAGE_RING_ENTRIES;
    for (uint64_t idx = end; idx > first && !found; idx--) {
        struct page_entry read;

        if (page_read(page, idx - 1, &read) && read.plan_id == plan_id) {
            *entry = read;
            found = 1;
        }
    }
    *seen_idx = end;
    uint64_t read_idx = atomic_load_explicit(&page->read_idx, memory_order_relaxed);
    while (read_idx < end && !atomic_compare_exchange_weak_explicit(
                                 &page->read_idx, &read_idx, end, memory_order_relaxed, memory_order_relaxed))
        ;
    return found;
}

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Not FUTEX_PRIVATE_FLAG: the word is shared between processes. */
static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *deadline)
{
    return syscall(SYS_futex, word, operation, value, deadline, NULL, FUTEX_BITSET_MATCH_ANY);
}

void flag_set(_Atomic uint32_t *flag)
{
    atomic_store_explicit(flag, 1, memory_order_release);
    /* Always, since the word has no room to say that somebody sleeps: it is 0 or 1, for GPU streams use it
     * too. */
    futex(flag, FUTEX_WAKE, INT_MAX, NULL);
}

/* 1 if the flag was set and is now cleared; else 0 and what the word held. */
static int flag_take(_Atomic uint32_t *flag, uint32_t *held)
{
    /* A plain load first: a failing exchange would take the cache line away from the one who is to set it. */
    *held = atomic_load_explicit(flag, memory_order_relaxed);
    return *held == 1 &&
           atomic_compare_exchange_strong_explicit(flag, held, 0, memory_order_acquire, memory_order_relaxed);
}

enum epd_status flag_wait(_Atomic uint32_t *flag, uint64_t deadline_ns)
{
    struct timespec deadline = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                                .tv_nsec = (long)(deadline_ns % 1000000000u)};
    uint32_t held;

    for (int i = 0; i < FLAG_SPINS; i++) {
        if (flag_take(flag, &held))
            return EPD_OK;
        cpu_relax();
    }
    for (;;) {
        if (flag_take(flag, &held))
            return EPD_OK;
        /* Sleeps on what the word holds, not on 0: a peer that stores nonsense must not make this spin. */
        if (futex(flag, FUTEX_WAIT_BITSET, held, &deadline) == 0 || errno == EAGAIN || errno == EINTR)
            continue;
        if (errno != ETIMEDOUT)
            return EPD_SYSTEM;
        return flag_take(flag, &held) ? EPD_OK : EPD_TIMEOUT;
    }
}
