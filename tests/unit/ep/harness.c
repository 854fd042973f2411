#include "tests/unit/ep/harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ep/futex.h"
#include "ep/plan_check.h"
#include "tests/unit/ep/harness_memory.h"

/* Sanitizer builds on a busy machine are slow; a test that hangs still ends. */
#define TEST_TIMEOUT_S 300
/* Of one test where Check has no fork to end. */
#define CUDA_TEST_LIMIT_S 100

/* Poison between tensors. */
#define GAP_BYTES 256u

static int count_fds(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    ck_assert_ptr_nonnull(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void ring_bell(void *arg)
{
    struct harness *harness = arg;
    atomic_fetch_add(&harness->bell, 1);
    futex_wake_all(&harness->bell);
}

static void load_transport(void)
{
    struct epd_error error = {.status = EPD_OK};
    const struct transport *transport = transport_find(harness_memory_backend(), &error);
    const struct transport_options options = {.ways = "tcp", .devices = "lo"};
    ck_assert_msg(transport && transport->load(&options, &error) == EPD_OK, "%s", error.text);
}

static uint32_t nodes_wanted(void)
{
    const char *text = getenv("EPD_TEST_NODES");
    const int n = text ? atoi(text) : 1;
    ck_assert_msg(n >= 1 && n <= HARNESS_MAX_NODES, "EPD_TEST_NODES is 1 to %d", HARNESS_MAX_NODES);
    return (uint32_t)n;
}

static enum epd_crossing crossing_wanted(void)
{
    const char *text = getenv("EPD_TEST_CROSSING");
    const int eager = text && !strcmp(text, "eager");
    ck_assert_msg(!text || eager || !strcmp(text, "static"), "EPD_TEST_CROSSING is eager or static");
    return eager ? EPD_CROSSING_EAGER : text ? EPD_CROSSING_STATIC : EPD_CROSSING_UNSPECIFIED;
}

int harness_spans(uint32_t world_size)
{
    return world_size % nodes_wanted() == 0;
}

void harness_open(struct harness *harness, uint32_t n_devices, uint64_t heap_limit_bytes)
{
    struct epd_error error = {.status = EPD_OK};
    *harness = (struct harness){.n_fds = count_fds()};
    struct node_config config = {
        .backend = harness_memory_backend(),
        .n_devices = harness_memory_devices(n_devices, nodes_wanted()),
        .heap_limit_bytes = heap_limit_bytes,
        .notify = ring_bell,
        .notify_arg = harness,
    };
    harness->n_nodes = nodes_wanted();
    if (harness->n_nodes > 1)
        load_transport();
    for (uint32_t i = 0; i < harness->n_nodes; i++) {
        config.devices = harness_memory_device_list(i, harness->n_nodes);
        ck_assert_msg(node_open(&config, &harness->nodes[i], &error) == EPD_OK, "%s", error.text);
    }
    harness->node = harness->nodes[0];
}

static uint32_t poll_nodes(struct harness *harness)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < harness->n_nodes; i++)
        n += node_poll(harness->nodes[i]);
    return n;
}

void harness_wait(struct harness *harness, const int *flag)
{
    while (!*flag) {
        uint32_t bell = atomic_load(&harness->bell);
        if (!poll_nodes(harness) && !*flag)
            futex_wait(&harness->bell, bell, NULL);
    }
}

void harness_settle(struct harness *harness)
{
    const uint32_t n_devices = node_n_devices(harness->node);
    for (uint32_t i = 0; i < n_devices * harness->n_nodes; i++) {
        struct device_info info;
        uint32_t bell = atomic_load(&harness->bell);
        while (poll_nodes(harness))
            ;
        node_device_info(harness->nodes[i / n_devices], i % n_devices, &info);
        if (!info.jobs_queued)
            continue;
        futex_wait(&harness->bell, bell, NULL);
        i = UINT32_MAX; /* from the first device again: completions may have given new jobs */
    }
}

void harness_close(struct harness *harness)
{
    harness_settle(harness);
    const uint32_t n_devices = node_n_devices(harness->node);
    for (uint32_t i = 0; i < n_devices * harness->n_nodes; i++) {
        struct device_info info;
        node_device_info(harness->nodes[i / n_devices], i % n_devices, &info);
        ck_assert_uint_eq(info.heap_bytes, 0);
        ck_assert_uint_eq(info.imported_bytes, 0);
        ck_assert_uint_eq(info.n_imports, 0);
    }
    for (uint32_t i = 0; i < harness->n_nodes; i++)
        node_close(harness->nodes[i]);
    /* CUDA keeps fds of its own, and so does the library between nodes. */
    if (harness_memory_backend() == EPD_BACKEND_HOST && harness->n_nodes == 1)
        ck_assert_int_eq(count_fds(), harness->n_fds);
}

struct acquired {
    int ended;
    struct memory *memory;
    struct epd_error error;
};

static void on_memory(void *arg, struct memory *memory, const struct epd_error *error)
{
    struct acquired *acquired = arg;
    acquired->ended = 1;
    acquired->memory = memory;
    acquired->error = *error;
}

static enum epd_status acquire_on(struct harness *harness, struct node *node,
                                  const struct memory_request *request, struct memory **memory,
                                  struct epd_error *error)
{
    struct acquired acquired = {0};
    if (memory_acquire(node, request, on_memory, &acquired, error))
        return error->status;
    harness_wait(harness, &acquired.ended);
    *memory = acquired.memory;
    *error = acquired.error;
    ck_assert_int_eq(acquired.memory == NULL, acquired.error.status != EPD_OK);
    return acquired.error.status;
}

enum epd_status harness_acquire(struct harness *harness, const struct memory_request *request,
                                struct memory **memory, struct epd_error *error)
{
    return acquire_on(harness, harness->node, request, memory, error);
}

/* The client's own memfd; *fd stays with it. */
static struct memory_request import_request(uint32_t device_idx, uint64_t bytes, int *fd)
{
    *fd = memfd_create("client", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_ge(*fd, 0);
    ck_assert_int_eq(ftruncate(*fd, (off_t)bytes), 0);
    ck_assert_int_eq(fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    return (struct memory_request){.device_idx = device_idx,
                                   .kind = EPD_MEMORY_MEMFD,
                                   .bytes = bytes,
                                   .fd = fcntl(*fd, F_DUPFD_CLOEXEC, 0)};
}

static void client_init(struct client *client, struct harness *harness, struct node *node,
                        uint32_t device_idx, uint64_t bytes)
{
    struct epd_error error = {.status = EPD_OK};
    struct memory_request request = {
        .device_idx = device_idx, .kind = EPD_MEMORY_HEAP, .bytes = bytes, .fd = -1};
    int own_fd = -1;
    *client = (struct client){.bytes = bytes, .used = GAP_BYTES};
    if (harness->imports && harness_memory_backend() == EPD_BACKEND_HOST)
        request = import_request(device_idx, bytes, &own_fd);
    ck_assert_msg(page_create(&client->page, &client->page_fd, &error) == EPD_OK, "%s", error.text);
    ck_assert_msg(acquire_on(harness, node, &request, &client->memory, &error) == EPD_OK, "%s", error.text);
    harness_memory_map(client, own_fd);
    if (own_fd >= 0)
        close(own_fd);
    values_poison(client->base, GAP_BYTES);
}

static void client_fini(struct client *client)
{
    ck_assert(values_poisoned(client->base, GAP_BYTES));
    for (uint32_t i = 0; i < client->n_slabs; i++)
        ck_assert_msg(values_poisoned(client->base + client->gap_at[i], client->gap_bytes[i]),
                      "written behind tensor %u", i);
    harness_memory_unmap(client);
    memory_release(client->memory);
    page_close(client->page);
    close(client->page_fd);
}

struct slab client_take(struct client *client, enum epd_dtype dtype, uint32_t n_dims, int64_t d0, int64_t d1,
                        int64_t d2)
{
    struct slab slab = {.offset = client->used, .dtype = dtype, .n_dims = n_dims, .shape = {d0, d1, d2}};
    slab.bytes = dtype_bytes(dtype);
    for (uint32_t i = 0; i < n_dims; i++)
        slab.bytes *= (uint64_t)slab.shape[i];
    slab.data = client->base + slab.offset;
    /* The gap begins with the first byte behind the tensor. */
    uint64_t next = (slab.offset + slab.bytes + 2 * GAP_BYTES - 1) / GAP_BYTES * GAP_BYTES;
    ck_assert_msg(next <= client->bytes, "the client's buffer is too small");
    values_poison(slab.data, next - slab.offset);
    client->used = next;
    ck_assert_uint_lt(client->n_slabs, HARNESS_MAX_SLABS);
    client->gap_at[client->n_slabs] = slab.offset + slab.bytes;
    client->gap_bytes[client->n_slabs] = next - slab.offset - slab.bytes;
    client->n_slabs++;
    return slab;
}

struct slab client_put(struct client *client, enum epd_dtype dtype, uint32_t n_dims, int64_t d0, int64_t d1,
                       int64_t d2, const void *data)
{
    struct slab slab = client_take(client, dtype, n_dims, d0, d1, d2);
    if (slab.bytes)
        memcpy(slab.data, data, slab.bytes);
    return slab;
}

void slab_poison(const struct slab *slab)
{
    values_poison(slab->data, slab->bytes);
}

/* A rank that is none asks the first node. */
static uint32_t node_of(const struct crew *crew, uint32_t rank)
{
    return rank < crew->world_size ? rank / (crew->world_size / crew->n_nodes) : 0;
}

struct all_rails {
    int n_ended;
    struct epd_error error;
};

static void on_rails(void *arg, const struct epd_error *error)
{
    struct all_rails *all = arg;
    all->n_ended++;
    if (error->status)
        all->error = *error;
}

static void wait_rails(struct crew *crew, struct all_rails *all)
{
    struct harness *harness = crew->harness;
    while (all->n_ended < (int)crew->n_nodes) {
        uint32_t bell = atomic_load(&harness->bell);
        if (!poll_nodes(harness))
            futex_wait(&harness->bell, bell, NULL);
    }
    ck_assert_msg(all->error.status == EPD_OK, "%s", all->error.text);
    *all = (struct all_rails){0};
}

/* What daemons do by messages. */
static void span_nodes(struct crew *crew)
{
    struct epd_error error = {.status = EPD_OK};
    struct all_rails all = {0};
    static struct transport_address addresses[HARNESS_MAX_RANKS];
    const uint32_t n = crew->world_size / crew->n_nodes;
    for (uint32_t i = 0; i < crew->n_nodes; i++)
        ck_assert_msg(rails_open(crew->harness->nodes[i], i, n, crew->device_idx + i * n, on_rails, &all,
                                 &crew->rails[i], &error) == EPD_OK,
                      "%s", error.text);
    wait_rails(crew, &all);
    for (uint32_t r = 0; r < crew->world_size; r++)
        addresses[r] = *rails_address(crew->rails[node_of(crew, r)], r % n);
    for (uint32_t i = 0; i < crew->n_nodes; i++)
        ck_assert_int_eq(
            rails_connect(crew->rails[i], crew->n_nodes, addresses, 60000000000ull, on_rails, &all, &error),
            EPD_OK);
    wait_rails(crew, &all);
    for (uint32_t i = 0; i < crew->n_nodes; i++) {
        const struct team_span span = {.n_nodes = crew->n_nodes, .node = i, .rails = crew->rails[i]};
        ck_assert_msg(team_create_spanning(crew->harness->nodes[i], &crew->config, crew->world_size,
                                           crew->device_idx + i * n, &span, &crew->teams[i],
                                           &error) == EPD_OK,
                      "%s", error.text);
    }
}

void crew_init(struct crew *crew, struct harness *harness, const struct message_group_config *config,
               uint32_t world_size, uint64_t bytes_per_rank)
{
    struct epd_error error = {.status = EPD_OK};
    *crew = (struct crew){.harness = harness, .config = *config, .world_size = world_size};
    crew->n_nodes = world_size % harness->n_nodes ? 1 : harness->n_nodes;
    for (uint32_t r = 0; r < world_size; r++)
        crew->device_idx[r] = r % node_n_devices(harness->node);
    if (crew->n_nodes == 1)
        ck_assert_msg(team_create(harness->node, config, world_size, crew->device_idx, &crew->teams[0],
                                  &error) == EPD_OK,
                      "%s", error.text);
    else
        span_nodes(crew);
    crew->team = crew->teams[0];
    for (uint32_t r = 0; r < world_size; r++)
        client_init(&crew->clients[r], harness, harness->nodes[node_of(crew, r)], crew->device_idx[r],
                    bytes_per_rank);
}

void crew_fini(struct crew *crew)
{
    for (uint32_t r = 0; r < crew->world_size; r++)
        client_fini(&crew->clients[r]);
    for (uint32_t i = 0; i < crew->n_nodes; i++) {
        team_destroy(crew->teams[i]);
        if (crew->rails[i])
            rails_close(crew->rails[i]);
    }
}

void draft_init(struct draft *draft, struct crew *crew, uint32_t rank, enum epd_op op)
{
    struct client *client = &crew->clients[rank];
    *draft = (struct draft){.request = {
                                .op = op,
                                .rank = rank,
                                .saved_budget_bytes = UINT64_MAX,
                                .page = client->page,
                                .flag_idx = client->n_flags,
                                .public_id = 1000 + client->n_flags,
                            }};
    client->n_flags++;
    ck_assert_uint_le(client->n_flags, EPD_PAGE_MAX_PLANS);
}

void draft_bind_part(struct draft *draft, struct crew *crew, enum epd_role role, uint32_t part_idx,
                     uint32_t n_parts, const struct slab *slab)
{
    struct plan_binding *binding = &draft->bindings[draft->request.n_bindings++];
    ck_assert_uint_le(draft->request.n_bindings, HARNESS_MAX_BINDINGS);
    *binding = (struct plan_binding){
        .role = role,
        .part_idx = part_idx,
        .n_parts = n_parts,
        .memory = crew->clients[draft->request.rank].memory,
        .offset = slab->offset,
        .dtype = slab->dtype,
        .n_dims = slab->n_dims,
        .shape = {slab->shape[0], slab->shape[1], slab->shape[2]},
    };
}

void draft_bind(struct draft *draft, struct crew *crew, enum epd_role role, const struct slab *slab)
{
    draft_bind_part(draft, crew, role, 0, 0, slab);
}

struct created {
    int ended;
    struct plan *plan;
    struct epd_error error;
};

static void on_plan(void *arg, struct plan *plan, const struct epd_error *error)
{
    struct created *created = arg;
    created->ended = 1;
    created->plan = plan;
    created->error = *error;
}

struct plan *draft_create(struct draft *draft, struct crew *crew, struct epd_error *error)
{
    struct created created = {0};
    struct plan_request *request = &draft->request;
    if (!request->crossing && !request->context && plan_check_crosses(request->op))
        request->crossing = crossing_wanted();
    draft->request.bindings = draft->bindings;
    error->status = EPD_OK;
    if (plan_create(crew->teams[node_of(crew, draft->request.rank)], &draft->request, on_plan, &created,
                    error))
        return NULL;
    harness_wait(crew->harness, &created.ended);
    *error = created.error;
    ck_assert_int_eq(created.plan == NULL, created.error.status != EPD_OK);
    return created.plan;
}

/* What daemons agree on when a plan is made. */
static void agree(const struct crew_plan *plan)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < plan->n_nodes; i++) {
        const uint32_t n_tokens = plan_set_tokens(plan->sets[i]);
        most = n_tokens > most ? n_tokens : most;
    }
    for (uint32_t i = 0; i < plan->n_nodes; i++)
        plan_set_agree(plan->sets[i], most);
}

void crew_plan_create(struct crew_plan *plan, struct crew *crew, struct draft *drafts, uint32_t n)
{
    struct epd_error error = {.status = EPD_OK};
    *plan = (struct crew_plan){.crew = crew, .n = n};
    for (uint32_t i = 0; i < n; i++) {
        plan->plans[i] = draft_create(&drafts[i], crew, &error);
        ck_assert_msg(plan->plans[i] != NULL, "%s", error.text);
        plan->ranks[i] = drafts[i].request.rank;
        plan->flag_idx[i] = drafts[i].request.flag_idx;
    }
    plan->n_nodes = op_is_collective(drafts[0].request.op) ? crew->n_nodes : 1;
    const uint32_t n_here = n / plan->n_nodes;
    for (uint32_t i = 0; i < plan->n_nodes; i++)
        ck_assert_msg(plan_join(plan->plans + i * n_here, n_here, &plan->sets[i], &error) == EPD_OK, "%s",
                      error.text);
    agree(plan);
    plan->set = plan->sets[0];
}

static void on_gone(void *arg)
{
    *(int *)arg += 1;
}

void harness_destroy_plan(struct harness *harness, struct plan *plan)
{
    int gone = 0;
    plan_destroy(plan, on_gone, &gone);
    harness_wait(harness, &gone);
}

void crew_plan_destroy_sets(struct crew_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_nodes; i++)
        plan_set_destroy(plan->sets[i]);
}

void crew_plan_destroy(struct crew_plan *plan)
{
    crew_plan_destroy_sets(plan);
    for (uint32_t i = 0; i < plan->n; i++)
        harness_destroy_plan(plan->crew->harness, plan->plans[i]);
}

static void on_step(void *arg, const struct step_result *result)
{
    const struct outcome_part *part = arg;
    struct outcome *outcome = part->outcome;
    outcome->ended = --outcome->n_left == 0;
    outcome->n_ranks += result->n_ranks;
    memcpy(outcome->ranks + part->first_rank, result->ranks, result->n_ranks * sizeof *result->ranks);
    outcome->has_expert_rows = result->expert_rows != NULL;
    for (uint32_t e = 0; result->expert_rows && e < result->n_experts && e < 64; e++)
        outcome->expert_rows[e] = result->expert_rows[e];
}

static struct page_plan *words_of(const struct crew_plan *plan, uint32_t i)
{
    return &plan->crew->clients[plan->ranks[i]].page->plans[plan->flag_idx[i]];
}

void launch_start(struct crew_plan *plan, const uint32_t *n_tokens, uint32_t liars, struct outcome *outcome)
{
    struct epd_error error = {.status = EPD_OK};
    uint64_t seqs[HARNESS_MAX_RANKS];
    *outcome = (struct outcome){0};
    plan->crew->seq++;
    for (uint32_t i = 0; i < plan->n; i++)
        harness_memory_push(&plan->crew->clients[plan->ranks[i]]);
    for (uint32_t i = 0; i < plan->n; i++) {
        seqs[i] = plan->crew->seq;
        if (!(liars >> i & 1))
            flag_set(&words_of(plan, i)->ready);
    }
    outcome->n_left = plan->n_nodes;
    for (uint32_t i = 0; i < plan->n_nodes; i++) {
        const uint32_t first = i * (plan->n / plan->n_nodes);
        outcome->parts[i] = (struct outcome_part){.outcome = outcome, .node = i, .first_rank = first};
        ck_assert_msg(step_submit(plan->sets[i], n_tokens + first, seqs + first, on_step, &outcome->parts[i],
                                  &error) == EPD_OK,
                      "%s", error.text);
    }
}

void launch_wait(struct crew_plan *plan, struct outcome *outcome)
{
    harness_wait(plan->crew->harness, &outcome->ended);
    ck_assert_uint_eq(outcome->n_ranks, plan->n);
    for (uint32_t i = 0; i < plan->n; i++) {
        harness_memory_pull(&plan->crew->clients[plan->ranks[i]]);
        ck_assert_int_eq(flag_wait(&words_of(plan, i)->done, 0), EPD_OK);
        ck_assert_uint_eq(atomic_load(&words_of(plan, i)->ready), 0);
        int reported = page_take(plan->crew->clients[plan->ranks[i]].page, 1000 + plan->flag_idx[i],
                                 &plan->seen[i], &outcome->entries[i]);
        ck_assert_int_eq(reported, outcome->ranks[i].status != EPD_OK);
        if (reported)
            ck_assert_uint_eq(outcome->entries[i].status, outcome->ranks[i].status);
    }
}

void launch(struct crew_plan *plan, const uint32_t *n_tokens, struct outcome *outcome)
{
    launch_start(plan, n_tokens, 0, outcome);
    launch_wait(plan, outcome);
}

void launch_expect(struct crew_plan *plan, const uint32_t *n_tokens, enum epd_status status)
{
    struct outcome outcome;
    launch(plan, n_tokens, &outcome);
    for (uint32_t i = 0; i < plan->n; i++)
        ck_assert_msg(outcome.ranks[i].status == status, "rank %u: %s, want %s: %s", plan->ranks[i],
                      status_name(outcome.ranks[i].status), status_name(status), outcome.entries[i].text);
}

/* A case of each test, so that one can be named. */
static SRunner *runner_create(const char *name, const TTest *const *tests, size_t n_tests)
{
    Suite *suite = suite_create(name);
    for (size_t i = 0; i < n_tests; i++) {
        TCase *tcase = tcase_create(tests[i]->name);
        tcase_set_timeout(tcase, TEST_TIMEOUT_S);
        tcase_add_test(tcase, tests[i]);
        suite_add_tcase(suite, tcase);
    }
    SRunner *runner = srunner_create(suite);
    /* A process that has used CUDA cannot go on in a fork. */
    if (harness_memory_backend() != EPD_BACKEND_HOST)
        srunner_set_fork_status(runner, CK_NOFORK);
    return runner;
}

/* One after the other, each with its name before it: what hangs is the last one named, and without forks
 * nobody but the alarm ends it. */
int suite_run(const char *name, const TTest *const *tests, size_t n_tests)
{
    const char *only = getenv("EPD_TEST_CASE");
    if (!harness_memory_begin())
        return HARNESS_SKIPPED;
    SRunner *runner = runner_create(name, tests, n_tests);
    for (size_t i = 0; i < n_tests; i++) {
        if (only && !strstr(tests[i]->name, only))
            continue;
        printf("%s\n", tests[i]->name);
        fflush(stdout);
        if (srunner_fork_status(runner) == CK_NOFORK)
            alarm(CUDA_TEST_LIMIT_S);
        srunner_run(runner, name, tests[i]->name, CK_SILENT);
        alarm(0);
    }
    srunner_print(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner), n_run = srunner_ntests_run(runner);
    srunner_free(runner);
    return n_failed || n_run == 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
