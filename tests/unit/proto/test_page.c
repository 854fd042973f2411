/* The session page: sealed, checked, its ring of failures, and flags between two processes. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/page.h"
#include "tests/unit/proto/suite.h"

#define SECOND_NS 1000000000ull

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

struct bench {
    struct page *daemon, *client; /* two mappings of one page */
    int fd;
    struct epd_error error;
};

static void bench_init(struct bench *bench)
{
    ck_assert_int_eq(page_create(&bench->daemon, &bench->fd, &bench->error), EPD_OK);
    ck_assert_int_eq(page_open(bench->fd, sizeof(struct page), &bench->client, &bench->error), EPD_OK);
}

static void bench_fini(struct bench *bench)
{
    page_close(bench->client);
    page_close(bench->daemon);
    close(bench->fd);
}

START_TEST(a_page_is_zero_and_cannot_change_its_size)
{
    struct bench bench;

    bench_init(&bench);
    ck_assert_int_eq(fcntl(bench.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    ck_assert_uint_eq(bench.client->magic, EPD_PAGE_MAGIC);
    ck_assert_uint_eq(bench.client->max_plans, EPD_PAGE_MAX_PLANS);
    ck_assert_uint_eq(bench.client->closed, 0);
    for (int i = 0; i < EPD_PAGE_MAX_PLANS; i++)
        ck_assert_uint_eq(bench.client->plans[i].ready | bench.client->plans[i].done, 0);
    ck_assert_int_eq(ftruncate(bench.fd, 0), -1);
    ck_assert_int_eq(errno, EPERM);
    ck_assert_int_eq(ftruncate(bench.fd, 1 << 20), -1);
    ck_assert_int_eq(fcntl(bench.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
    bench.daemon->plans[3].completed = 9;
    ck_assert_uint_eq(bench.client->plans[3].completed, 9);
    bench_fini(&bench);
}
END_TEST

static int make_memfd(size_t bytes, unsigned flags, int seals)
{
    int fd = memfd_create("page-test", flags);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, (off_t)bytes), 0);
    if (seals)
        ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static void expect_refused(int fd, uint64_t bytes, enum epd_status want, const char *text)
{
    struct page *page = (struct page *)1;
    struct epd_error error = {0};

    ck_assert_int_eq(page_open(fd, bytes, &page, &error), want);
    ck_assert_int_eq(error.status, want);
    ck_assert_msg(strstr(error.text, text) != NULL, "%s", error.text);
    ck_assert_ptr_eq(page, (struct page *)1);
    close(fd);
}

START_TEST(a_page_that_could_shrink_or_is_short_is_refused)
{
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
    const size_t bytes = sizeof(struct page);

    expect_refused(make_memfd(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING, 0), bytes, EPD_PROTOCOL, "seals 0x0");
    expect_refused(make_memfd(bytes, MFD_CLOEXEC, 0), bytes, EPD_PROTOCOL, "seals 0x1");
    expect_refused(make_memfd(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING, F_SEAL_GROW | F_SEAL_SEAL), bytes,
                   EPD_PROTOCOL, "seals 0x5");
    expect_refused(make_memfd(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING, seals | F_SEAL_WRITE), bytes,
                   EPD_PROTOCOL, "seals 0xf");
    expect_refused(make_memfd(bytes - 1, MFD_CLOEXEC | MFD_ALLOW_SEALING, seals), bytes, EPD_PROTOCOL,
                   "in the file, want");
    expect_refused(make_memfd(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING, seals), bytes - 1, EPD_PROTOCOL,
                   "bytes announced");
    expect_refused(open("/dev/null", O_RDWR | O_CLOEXEC), bytes, EPD_PROTOCOL, "not a memfd");
    expect_refused(make_memfd(bytes, MFD_CLOEXEC | MFD_ALLOW_SEALING, seals), bytes, EPD_VERSION_MISMATCH,
                   "magic 0x0 version 0");
}
END_TEST

/* Sets one limit of this process (each test is its own) so that page_create fails, and expects no fd left
 * open. */
static void expect_not_created(int resource, rlim_t limit, enum epd_status want, const char *text)
{
    struct page *page = (struct page *)1;
    struct epd_error error = {0};
    struct rlimit was, now;
    int fd = -77, next = dup(0);

    close(next);
    ck_assert_int_eq(getrlimit(resource, &was), 0);
    now = (struct rlimit){.rlim_cur = limit, .rlim_max = was.rlim_max};
    ck_assert_int_eq(setrlimit(resource, &now), 0);
    enum epd_status status = page_create(&page, &fd, &error);
    ck_assert_int_eq(setrlimit(resource, &was), 0);
    ck_assert_int_eq(status, want);
    ck_assert_msg(strstr(error.text, text) != NULL, "%s", error.text);
    ck_assert_ptr_eq(page, (struct page *)1);
    ck_assert_int_eq(fd, -77);
    int after = dup(0);
    ck_assert_int_eq(after, next);
    close(after);
}

START_TEST(a_page_that_cannot_be_made_leaves_nothing_open)
{
    signal(SIGXFSZ, SIG_IGN);
    expect_not_created(RLIMIT_NOFILE, 0, EPD_SYSTEM, "memfd_create");
    expect_not_created(RLIMIT_FSIZE, 4096, EPD_NO_MEMORY, "bytes");
}
END_TEST

static void report(struct page *page, uint64_t plan_id, uint64_t seq)
{
    struct page_entry entry = {
        .plan_id = plan_id, .seq = seq, .status = EPD_TIMEOUT, .phase = 1, .rank = -1, .stamp = 99};

    snprintf(entry.text, sizeof entry.text, "plan %llu seq %llu", (unsigned long long)plan_id,
             (unsigned long long)seq);
    page_report(page, &entry);
}

START_TEST(a_client_takes_the_newest_failure_of_its_plan)
{
    struct bench bench;
    struct page_entry entry;
    uint64_t seen = 0, seen_other = 0;

    bench_init(&bench);
    ck_assert_int_eq(page_take(bench.client, 5, &seen, &entry), 0);
    report(bench.daemon, 5, 1);
    report(bench.daemon, 6, 2);
    report(bench.daemon, 5, 3);
    report(bench.daemon, 6, 4);
    ck_assert_int_eq(page_take(bench.client, 5, &seen, &entry), 1);
    ck_assert_uint_eq(entry.plan_id, 5);
    ck_assert_uint_eq(entry.seq, 3);
    ck_assert_uint_eq(entry.status, EPD_TIMEOUT);
    ck_assert_int_eq(entry.rank, -1);
    ck_assert_str_eq(entry.text, "plan 5 seq 3");
    ck_assert_uint_eq(seen, 4);
    ck_assert_int_eq(page_take(bench.client, 5, &seen, &entry), 0);
    ck_assert_int_eq(page_take(bench.client, 6, &seen_other, &entry), 1);
    ck_assert_uint_eq(entry.seq, 4);
    ck_assert_uint_eq(bench.client->read_idx, 4);
    bench_fini(&bench);
}
END_TEST

START_TEST(an_overwritten_failure_is_gone)
{
    struct bench bench;
    struct page_entry entry;
    uint64_t seen = 0;

    bench_init(&bench);
    report(bench.daemon, 5, 1);
    for (uint64_t i = 0; i < EPD_PAGE_RING_ENTRIES - 1; i++)
        report(bench.daemon, 6, i);
    uint64_t copy = seen;
    ck_assert_int_eq(page_take(bench.client, 5, &copy, &entry), 1);
    report(bench.daemon, 6, 100);
    ck_assert_int_eq(page_take(bench.client, 5, &seen, &entry), 0);
    ck_assert_uint_eq(seen, EPD_PAGE_RING_ENTRIES + 1);
    bench_fini(&bench);
}
END_TEST

START_TEST(a_client_that_writes_nonsense_into_the_page_hurts_only_itself)
{
    struct bench bench;
    struct page_entry entry;
    uint64_t seen = UINT64_MAX - 5;

    bench_init(&bench);
    bench.client->write_idx = UINT64_MAX - 1;
    for (uint64_t i = 0; i < 3 * EPD_PAGE_RING_ENTRIES; i++)
        report(bench.daemon, 5, i);
    memset((void *)bench.client->ring, 0xff, sizeof bench.client->ring);
    (void)page_take(bench.client, 5, &seen, &entry);
    ck_assert_uint_eq(bench.daemon->plans[EPD_PAGE_MAX_PLANS - 1].ready, 0);
    bench_fini(&bench);
}
END_TEST

static void *report_many(void *page)
{
    for (uint64_t i = 1; i <= 20000; i++)
        report(page, 1 + i % 3, i);
    return NULL;
}

START_TEST(an_entry_is_whole_or_not_there_while_lanes_report)
{
    struct bench bench;
    pthread_t lanes[2];
    uint64_t seen = 0;
    struct page_entry entry;

    bench_init(&bench);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(pthread_create(&lanes[i], NULL, report_many, bench.daemon), 0);
    while (atomic_load(&bench.client->write_idx) < 40000) {
        char want[64];
        if (!page_take(bench.client, 2, &seen, &entry))
            continue;
        snprintf(want, sizeof want, "plan 2 seq %llu", (unsigned long long)entry.seq);
        ck_assert_str_eq(entry.text, want);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(lanes[i], NULL);
    bench_fini(&bench);
}
END_TEST

START_TEST(a_flag_that_is_set_is_taken_at_once_and_cleared)
{
    struct bench bench;

    bench_init(&bench);
    flag_set(&bench.daemon->plans[0].ready);
    ck_assert_int_eq(flag_wait(&bench.client->plans[0].ready, 0), EPD_OK); /* also with its deadline gone */
    ck_assert_uint_eq(bench.daemon->plans[0].ready, 0);
    flag_set(&bench.daemon->plans[0].ready);
    flag_set(&bench.daemon->plans[0].ready);
    ck_assert_int_eq(flag_wait(&bench.client->plans[0].ready, UINT64_MAX), EPD_OK);
    ck_assert_int_eq(flag_wait(&bench.client->plans[0].ready, 0), EPD_TIMEOUT); /* a flag does not count */
    bench_fini(&bench);
}
END_TEST

START_TEST(a_flag_that_nobody_sets_ends_at_the_deadline)
{
    struct bench bench;
    uint64_t start = now_ns();

    bench_init(&bench);
    ck_assert_int_eq(flag_wait(&bench.client->plans[0].done, start + SECOND_NS / 20), EPD_TIMEOUT);
    uint64_t waited = now_ns() - start;
    ck_assert_uint_ge(waited, SECOND_NS / 20);
    ck_assert_uint_lt(waited, SECOND_NS);
    bench_fini(&bench);
}
END_TEST

START_TEST(a_word_with_nonsense_is_slept_on_until_the_deadline)
{
    struct bench bench;
    struct timespec before, after;

    bench_init(&bench);
    bench.client->plans[0].ready = 0xdeadbeef;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    ck_assert_int_eq(flag_wait(&bench.daemon->plans[0].ready, now_ns() + SECOND_NS / 10), EPD_TIMEOUT);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    uint64_t burnt = (uint64_t)(after.tv_sec - before.tv_sec) * SECOND_NS + (uint64_t)after.tv_nsec -
                     (uint64_t)before.tv_nsec;
    ck_assert_uint_lt(burnt, SECOND_NS / 20);
    ck_assert_uint_eq(bench.daemon->plans[0].ready, 0xdeadbeef);
    bench_fini(&bench);
}
END_TEST

START_TEST(two_processes_hand_a_flag_to_each_other)
{
    enum { n_rounds = 5000 };
    struct bench bench;

    bench_init(&bench);
    struct page_plan *plan = &bench.daemon->plans[7];
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        struct page *page;
        struct epd_error error;
        if (page_open(bench.fd, sizeof(struct page), &page, &error))
            _exit(1);
        for (int i = 0; i < n_rounds; i++) {
            if (flag_wait(&page->plans[7].ready, now_ns() + 30 * SECOND_NS))
                _exit(2);
            page->plans[7].completed++;
            flag_set(&page->plans[7].done);
        }
        _exit(0);
    }
    for (uint64_t i = 0; i < n_rounds; i++) {
        flag_set(&plan->ready);
        ck_assert_int_eq(flag_wait(&plan->done, now_ns() + 30 * SECOND_NS), EPD_OK);
        ck_assert_uint_eq(plan->completed, i + 1);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    bench_fini(&bench);
}
END_TEST

START_TEST(a_sleeper_in_another_process_is_woken)
{
    struct bench bench;

    bench_init(&bench);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        uint64_t start = now_ns();
        if (flag_wait(&bench.client->plans[1].done, start + 30 * SECOND_NS))
            _exit(1);
        _exit(now_ns() - start < 10 * SECOND_NS ? 0 : 2);
    }
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL); /* long enough for the child to be asleep */
    flag_set(&bench.daemon->plans[1].done);
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    bench_fini(&bench);
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("page");

    tcase_add_test(tcase, a_page_is_zero_and_cannot_change_its_size);
    tcase_add_test(tcase, a_page_that_could_shrink_or_is_short_is_refused);
    tcase_add_test(tcase, a_page_that_cannot_be_made_leaves_nothing_open);
    tcase_add_test(tcase, a_client_takes_the_newest_failure_of_its_plan);
    tcase_add_test(tcase, an_overwritten_failure_is_gone);
    tcase_add_test(tcase, a_client_that_writes_nonsense_into_the_page_hurts_only_itself);
    tcase_add_test(tcase, an_entry_is_whole_or_not_there_while_lanes_report);
    tcase_add_test(tcase, a_flag_that_is_set_is_taken_at_once_and_cleared);
    tcase_add_test(tcase, a_flag_that_nobody_sets_ends_at_the_deadline);
    tcase_add_test(tcase, a_word_with_nonsense_is_slept_on_until_the_deadline);
    tcase_add_test(tcase, two_processes_hand_a_flag_to_each_other);
    tcase_add_test(tcase, a_sleeper_in_another_process_is_woken);
    return suite_run("page", tcase);
}
