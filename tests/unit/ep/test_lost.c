/* A device that is lost, on a backend that works later: which launches count as completed. The client ends the others
 * itself, so one that counts though its `done` never comes is a stream that waits for ever.
 *
 * The backend is the host's with the ends of its work held back, or failing, as the test says. */
#include <stdlib.h>
#include <string.h>

#include "ep/device_watch.h"
#include "ep/node_impl.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define N_RANKS      2
#define LOST         0 /* the device, and the rank on it */

enum state {
    WELL,
    BUSY,        /* what is in the queue does not end */
    STUCK,       /* the last thing in the queue does not end */
    LOST_BEHIND, /* the queue took everything, and then the device was lost */
    LOST_BEFORE, /* the queue takes no done flag any more */
};

static _Atomic int state;
static _Atomic uint64_t n_tickets; /* of the lost queue */
static struct backend_device *_Atomic lost_device;
static struct backend_queue *_Atomic lost_queue;
static struct backend later; /* made before any lane runs */
static int no_memory;        /* for the next calloc of the loop thread */
static _Thread_local int on_loop;

void *__real_calloc(size_t n, size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);

void *__wrap_calloc(size_t n, size_t bytes)
{
    if (!on_loop || !no_memory)
        return __real_calloc(n, bytes);
    no_memory = 0;
    return NULL;
}

static enum epd_status open_device(const struct node_config *config, uint32_t device_idx,
                                   struct backend_device **device, struct device_info *info,
                                   struct epd_error *error)
{
    enum epd_status status = backend_host.device_open(config, device_idx, device, info, error);
    if (status == EPD_OK && device_idx == LOST)
        atomic_store(&lost_device, *device);
    return status;
}

static enum epd_status create_queue(struct backend_device *device, struct backend_queue **queue,
                                    struct epd_error *error)
{
    enum epd_status status = backend_host.queue_create(device, queue, error);
    if (status == EPD_OK && device == atomic_load(&lost_device))
        atomic_store(&lost_queue, *queue);
    return status;
}

static int is_lost_queue(const struct backend_queue *queue)
{
    return queue == atomic_load(&lost_queue);
}

static int queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error)
{
    const int now = is_lost_queue(queue) ? atomic_load(&state) : WELL;
    if (now == BUSY || (now == STUCK && ticket == atomic_load(&n_tickets)))
        return 0;
    if (now == LOST_BEHIND || now == LOST_BEFORE)
        (void)error_set(error, EPD_CUDA, "device: lost");
    return 1;
}

static enum epd_status queue_ticket(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error)
{
    enum epd_status status = backend_host.queue_ticket(queue, ticket, error);
    if (is_lost_queue(queue))
        *ticket = atomic_fetch_add(&n_tickets, 1) + 1;
    return status;
}

static enum epd_status flag_done(struct backend_queue *queue, const struct backend_flag *flag,
                                 struct epd_error *error)
{
    const int now = is_lost_queue(queue) ? atomic_load(&state) : WELL;
    if (now == LOST_BEFORE) /* as any other failure of a call */
        return error_set(error, EPD_NO_MEMORY, "done flag: refused");
    return now == WELL ? backend_host.flag_done(queue, flag, error) : EPD_OK;
}

enum epd_status __real_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);

enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    (void)backend;
    return __real_lane_start(&later, config, device_idx, lane, error);
}

struct pair {
    struct harness harness;
    struct crew crew;
    struct crew_plan plan; /* a barrier: nothing is computed */
};

static void pair_init(struct pair *pair)
{
    const struct message_group_config config = {.n_experts = 4,
                                                .top_k = 1,
                                                .hidden = 8,
                                                .max_tokens = 8,
                                                .capacity_rows = 16,
                                                .alignment = 1,
                                                .dtype = EPD_F32,
                                                .overflow = EPD_OVERFLOW_ERROR};
    struct draft drafts[N_RANKS];
    later = backend_host;
    later.works_later = 1;
    later.device_open = open_device;
    later.queue_create = create_queue;
    later.queue_ticket = queue_ticket;
    later.queue_reached = queue_reached;
    later.flag_done = flag_done;
    atomic_store(&state, WELL);
    harness_open(&pair->harness, N_RANKS, 0);
    pair->harness.node->backend = &later;
    crew_init(&pair->crew, &pair->harness, &config, N_RANKS, 1 << 16);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        draft_init(&drafts[rank], &pair->crew, rank, EPD_OP_BARRIER);
    crew_plan_create(&pair->plan, &pair->crew, drafts, N_RANKS);
}

static void pair_fini(struct pair *pair)
{
    atomic_store(&state, WELL);
    crew_plan_destroy(&pair->plan);
    crew_fini(&pair->crew);
    harness_close(&pair->harness);
}

static struct page_plan *words(const struct pair *pair, uint32_t rank)
{
    return &pair->crew.clients[rank].page->plans[pair->plan.flag_idx[rank]];
}

static void expect_words(const struct pair *pair, uint32_t rank, uint64_t completed, uint64_t failed,
                         uint32_t done)
{
    ck_assert_uint_eq(atomic_load(&words(pair, rank)->completed), completed);
    ck_assert_uint_eq(atomic_load(&words(pair, rank)->failed), failed);
    ck_assert_uint_eq(atomic_load(&words(pair, rank)->done), done);
}

static void note_lost(void *arg, const struct epd_error *error)
{
    ck_assert_int_eq(error->status, EPD_CUDA);
    *(int *)arg = 1;
}

/* The worker is told, whatever its device says when it is asked: the host's says that all is well. */
static void expect_worker_told(struct pair *pair)
{
    struct epd_error error = {.status = EPD_OK};
    struct device_watch *watch;
    int told = 0;
    const struct device_watch_rules rules = {
        .slow_ns = UINT64_MAX, .stuck_ns = UINT64_MAX, .lost = note_lost, .arg = &told};
    ck_assert_int_eq(device_watch_create(pair->harness.node, &rules, &watch, &error), EPD_OK);
    device_watch_look(watch);
    harness_wait(&pair->harness, &told);
    harness_settle(&pair->harness);
    device_watch_destroy(watch);
}

START_TEST(a_step_whose_device_is_lost_behind_it_is_left_to_the_client_to_end)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    launch_expect(&pair.plan, (uint32_t[N_RANKS]){0}, EPD_OK);
    expect_words(&pair, LOST, 1, 0, 0);
    atomic_store(&state, LOST_BEHIND);
    launch_start(&pair.plan, (uint32_t[N_RANKS]){0}, 0, &outcome);
    harness_wait(&pair.harness, &outcome.ended);
    ck_assert_int_eq(outcome.ranks[0].status, EPD_CUDA);
    ck_assert_int_eq(outcome.ranks[1].status, EPD_CUDA);
    expect_words(&pair, LOST, 1, 1, 0);
    expect_words(&pair, 1, 2, 1, 1);
    expect_worker_told(&pair);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_step_whose_done_flag_could_not_be_queued_is_left_to_the_client_to_end)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    atomic_store(&state, LOST_BEFORE);
    launch_start(&pair.plan, (uint32_t[N_RANKS]){0}, 0, &outcome);
    harness_wait(&pair.harness, &outcome.ended);
    ck_assert_int_eq(outcome.ranks[0].status, EPD_CUDA);
    ck_assert_int_eq(outcome.ranks[1].status, EPD_CUDA);
    expect_words(&pair, LOST, 0, 1, 0);
    expect_words(&pair, 1, 1, 1, 1);
    expect_worker_told(&pair);
    pair_fini(&pair);
}
END_TEST

/* A kernel that never ends is no reason to wait for ever, nor to tell the client that its launch is done. */
START_TEST(a_step_that_never_ends_on_its_device_costs_the_device)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    pair.harness.node->step_lost_ns = 50000000;
    atomic_store(&state, STUCK);
    launch_start(&pair.plan, (uint32_t[N_RANKS]){0}, 0, &outcome);
    harness_wait(&pair.harness, &outcome.ended);
    ck_assert_int_eq(outcome.ranks[0].status, EPD_CUDA);
    ck_assert_int_eq(outcome.ranks[1].status, EPD_CUDA);
    ck_assert_uint_eq(atomic_load(&words(&pair, LOST)->completed), 0);
    expect_worker_told(&pair);
    pair_fini(&pair);
}
END_TEST

static void refuse(struct pair *pair)
{
    struct epd_error error = {.status = EPD_OK};
    (void)error_set(&error, EPD_PEER_LOST, "a peer is gone");
    flag_set(&words(pair, LOST)->ready);
    plan_fail(pair->plan.plans[LOST], 1, &error, EPD_PHASE_GATHER, 1);
}

START_TEST(a_refused_launch_counts_as_failed_at_once_and_as_completed_with_its_done_flag)
{
    struct pair pair;
    pair_init(&pair);
    atomic_store(&state, BUSY);
    refuse(&pair);
    ck_assert_uint_eq(atomic_load(&words(&pair, LOST)->failed), 1);
    while (atomic_load(&words(&pair, LOST)->ready)) /* until the lane has it */
        ;
    ck_assert_uint_eq(atomic_load(&words(&pair, LOST)->completed), 0);
    atomic_store(&state, WELL);
    harness_settle(&pair.harness);
    ck_assert_uint_eq(atomic_load(&words(&pair, LOST)->completed), 1);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_refused_launch_on_a_lost_device_is_left_to_the_client_to_end)
{
    for (int when = LOST_BEHIND; when <= LOST_BEFORE; when++) {
        struct pair pair;
        pair_init(&pair);
        atomic_store(&state, when);
        refuse(&pair);
        harness_settle(&pair.harness);
        expect_words(&pair, LOST, 0, 1, 0);
        expect_worker_told(&pair);
        pair_fini(&pair);
    }
}
END_TEST

/* Its `done` would overtake the launch in front of it. */
START_TEST(a_refused_launch_that_no_memory_is_there_for_is_left_to_the_client_to_end)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    atomic_store(&state, BUSY);
    const uint64_t before = atomic_load(&n_tickets);
    launch_start(&pair.plan, (uint32_t[N_RANKS]){0}, 0, &outcome);
    while (atomic_load(&n_tickets) == before) /* until it is in the queue */
        ;
    on_loop = no_memory = 1;
    refuse(&pair);
    ck_assert_int_eq(no_memory, 0);
    ck_assert_uint_eq(atomic_load(&words(&pair, LOST)->ready), 1);
    expect_words(&pair, LOST, 0, 1, 0);
    atomic_store(&state, WELL);
    harness_wait(&pair.harness, &outcome.ended);
    expect_words(&pair, LOST, 1, 1, 0);
    expect_worker_told(&pair);
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_step_whose_device_is_lost_behind_it_is_left_to_the_client_to_end,
        a_step_whose_done_flag_could_not_be_queued_is_left_to_the_client_to_end,
        a_step_that_never_ends_on_its_device_costs_the_device,
        a_refused_launch_counts_as_failed_at_once_and_as_completed_with_its_done_flag,
        a_refused_launch_on_a_lost_device_is_left_to_the_client_to_end,
        a_refused_launch_that_no_memory_is_there_for_is_left_to_the_client_to_end,
    };
    return suite_run("lost", tests, COUNT(tests));
}
