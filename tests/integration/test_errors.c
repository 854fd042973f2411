/* What users do wrong, and what ranks do to each other, through a real daemon: every error is specific, names
 * who and what, and leaves the others working. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "tests/integration/daemon_process.h"
#include "tests/integration/layer.h"
#include "tests/reference/values.h"

static struct daemon_process epd_daemon;

static const struct op_case small = {.name = "small",
                                     .dtype = EPD_F32,
                                     .idx_dtype = EPD_I64,
                                     .world_size = 2,
                                     .n_experts = 4,
                                     .top_k = 2,
                                     .max_tokens = 8,
                                     .hidden = 32,
                                     .ffn = 16,
                                     .alignment = 1,
                                     .tokens = OP_TOKENS_EQUAL,
                                     .pattern = OP_UNIFORM,
                                     .capacity = OP_CAPACITY_AMPLE,
                                     .overflow = EPD_OVERFLOW_ERROR,
                                     .activation = EPD_SWIGLU};

static void start(void)
{
    daemon_start(&epd_daemon, 2, NULL);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

static void run(const char *name, rank_function function)
{
    unsigned n_failed = ranks_run(epd_daemon.socket_path, name, 2, function, &small);
    if (n_failed)
        daemon_print_log(&epd_daemon);
    ck_assert_uint_eq(n_failed, 0);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void expect_text(const char *a, const char *b)
{
    const char *text = epd_error_text();
    if (!strstr(text, a) || (b && !strstr(text, b))) {
        fprintf(stderr, "error text \"%s\" does not name \"%s\" and \"%s\"\n", text, a, b ? b : "");
        _exit(1);
    }
}

static struct epd_client *open_client(const struct rank *rank)
{
    struct epd_open_options options = {.size = sizeof(options), .socket_path = rank->socket_path};
    struct epd_client *client = NULL;
    RANK_CHECK(epd_open(&options, &client) == EPD_OK);
    return client;
}

static struct epd_group_options join_options(const struct rank *rank)
{
    struct layer layer = {.op_case = &small, .rank = rank};
    return layer_group_options(&layer);
}

static struct epd_plan *barrier_plan(struct layer *layer)
{
    return layer_plan(layer, (struct epd_plan_options){.op = EPD_OP_BARRIER}, NULL, 0);
}

static void mismatch_rank(const struct rank *rank)
{
    struct epd_client *client = open_client(rank);
    struct epd_group *group;
    struct epd_group_options options = join_options(rank);
    options.hidden = rank->rank == 0 ? 32 : 40;
    RANK_CHECK(epd_group_join(client, &options, &group) == EPD_GROUP_MISMATCH);
    expect_text("hidden", "40");
    expect_text("32", NULL);
    epd_close(client);
}

START_TEST(ranks_that_disagree_at_join_all_learn_the_field)
{
    run("mismatch", mismatch_rank);
}
END_TEST

static void invalid_config_rank(const struct rank *rank)
{
    struct epd_client *client = open_client(rank);
    struct epd_group *group;
    struct epd_group_options options = join_options(rank);
    options.n_experts = 5;
    RANK_CHECK(epd_group_join(client, &options, &group) != EPD_OK);
    expect_text("n_experts", "5");
    options = join_options(rank);
    options.alignment = 3;
    RANK_CHECK(epd_group_join(client, &options, &group) != EPD_OK);
    expect_text("alignment", "3");
    options = join_options(rank);
    options.dtype = EPD_I32;
    RANK_CHECK(epd_group_join(client, &options, &group) != EPD_OK);
    expect_text("dtype", NULL);
    options = join_options(rank);
    options.rank = 2;
    RANK_CHECK(epd_group_join(client, &options, &group) != EPD_OK);
    expect_text("rank", "2");
    epd_close(client);
}

START_TEST(an_invalid_group_configuration_names_the_field)
{
    run("invalid", invalid_config_rank);
}
END_TEST

static void timeout_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    epd_group_leave(layer.group);
    struct epd_group_options options = join_options(rank);
    options.name = "deadline";
    options.deadline_ms = 300;
    RANK_CHECK(epd_group_join(layer.client, &options, &layer.group) == EPD_OK);
    struct epd_plan *plan = barrier_plan(&layer);
    if (rank->rank == 0) {
        double begin = now_s();
        RANK_CHECK(layer_step(plan) == EPD_TIMEOUT);
        RANK_CHECK(now_s() - begin > 0.25 && now_s() - begin < 5);
        struct epd_failure failure = {.size = sizeof(failure)};
        RANK_CHECK(epd_plan_failure(plan, &failure) == EPD_OK);
        RANK_CHECK(failure.status == EPD_TIMEOUT && failure.rank == 1 && failure.phase == EPD_PHASE_GATHER);
        RANK_CHECK(strstr(failure.text, "rank 1") != NULL);
    } else {
        usleep(1500 * 1000);
    }
    layer_close(&layer);
}

START_TEST(a_missing_rank_is_named_at_the_deadline)
{
    run("timeout", timeout_rank);
}
END_TEST

static void order_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    struct epd_plan *first = barrier_plan(&layer), *second = barrier_plan(&layer);
    double begin = now_s();
    RANK_CHECK(layer_step(rank->rank == 0 ? first : second) == EPD_SEQ_MISMATCH);
    RANK_CHECK(now_s() - begin < 4); /* at once, not at a deadline */
    layer_close(&layer);
}

START_TEST(ranks_that_call_in_another_order_learn_it_at_once)
{
    run("order", order_rank);
}
END_TEST

static void plan_mismatch_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_plan *plan = NULL;
    layer_open(&layer, rank, &small);
    struct layer_tensor f[] = {layer_input(&layer, EPD_ROLE_X), layer_input(&layer, EPD_ROLE_TOPK_IDX),
                               layer_input(&layer, EPD_ROLE_TOPK_WEIGHTS),
                               layer_output(&layer, EPD_ROLE_RECV_X),
                               layer_output(&layer, EPD_ROLE_M_SPLITS)};
    struct epd_tensor tensors[5];
    for (int i = 0; i < 5; i++)
        tensors[i] = f[i].tensor;
    struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
    if (rank->rank == 1)
        options.op = EPD_OP_DISPATCH, options.tensors = tensors, options.n_tensors = 5;
    RANK_CHECK(epd_plan_create(layer.group, &options, &plan) == EPD_PLAN_MISMATCH);
    expect_text("barrier", "dispatch");
    layer_close(&layer);
}

START_TEST(ranks_that_create_other_plans_learn_it)
{
    run("plans", plan_mismatch_rank);
}
END_TEST

static void lost_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    struct epd_plan *plan = barrier_plan(&layer);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    if (rank->rank == 1) {
        usleep(200 * 1000);
        kill(getpid(), SIGKILL);
    }
    double begin = now_s();
    RANK_CHECK(layer_step(plan) == EPD_PEER_LOST);
    RANK_CHECK(now_s() - begin < 4);
    struct epd_failure failure = {.size = sizeof(failure)};
    RANK_CHECK(epd_plan_failure(plan, &failure) == EPD_OK);
    RANK_CHECK(failure.rank == 1 && failure.status == EPD_PEER_LOST);
    RANK_CHECK(layer_step(plan) == EPD_PEER_LOST); /* and again, at once */
    layer_close(&layer);
}

START_TEST(a_killed_rank_is_named_and_the_next_group_works)
{
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "lost", 2, lost_rank, &small), 1);
    run("lost", order_rank); /* the same name, joined anew */
}
END_TEST

static void expect_refused(struct layer *layer, struct epd_tensor *tensors, uint32_t n,
                           enum epd_status status, const char *a, const char *b)
{
    struct epd_plan *plan = NULL;
    struct epd_plan_options options = {.size = sizeof(options),
                                       .op = EPD_OP_GROUPED_GEMM,
                                       .layout = EPD_GEMM_TN,
                                       .tensors = tensors,
                                       .n_tensors = n};
    enum epd_status got = epd_plan_create(layer->group, &options, &plan);
    if (got != status) {
        fprintf(stderr, "want %s, got %s: %s\n", epd_status_name(status), epd_status_name(got),
                epd_error_text());
        _exit(1);
    }
    expect_text(a, b);
}

static void bindings_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    static const int64_t splits[2] = {3, 4};
    struct layer_tensor a = layer_tensor(&layer, EPD_ROLE_A, EPD_F32, (int64_t[]){7, 16}, 2, NULL);
    struct layer_tensor wide = layer_tensor(&layer, EPD_ROLE_A, EPD_F32, (int64_t[]){8, 16}, 2, NULL);
    struct layer_tensor b = layer_tensor(&layer, EPD_ROLE_B, EPD_F32, (int64_t[]){2, 8, 16}, 3, NULL);
    struct layer_tensor c = layer_tensor(&layer, EPD_ROLE_C, EPD_F32, (int64_t[]){7, 8}, 2, NULL);
    struct layer_tensor s = layer_tensor(&layer, EPD_ROLE_M_SPLITS, EPD_I64, (int64_t[]){2}, 1, splits);
    const struct epd_tensor good[4] = {a.tensor, b.tensor, c.tensor, s.tensor};
    struct epd_tensor t[5];
#define RESET() memcpy(t, good, sizeof(good))
    RESET(), t[2].shape[0] = 6;
    expect_refused(&layer, t, 4, EPD_INVALID_SHAPE, "c", "6");
    RESET(), t[1].shape[2] = 15;
    expect_refused(&layer, t, 4, EPD_INVALID_SHAPE, "15", "16");
    RESET(), t[0].dtype = EPD_BF16;
    expect_refused(&layer, t, 4, EPD_INVALID_DTYPE, "bf16", "f32");
    RESET(), t[3].dtype = EPD_I32;
    expect_refused(&layer, t, 4, EPD_INVALID_DTYPE, "m_splits", "i64");
    RESET(), t[0].offset_bytes = 1 << 20;
    expect_refused(&layer, t, 4, EPD_OUT_OF_RANGE, "a", NULL);
    RESET(), t[0].buffer = wide.tensor.buffer, t[0].offset_bytes = 2;
    expect_refused(&layer, t, 4, EPD_INVALID_ALIGNMENT, "a", "2");
    RESET();
    expect_refused(&layer, t, 3, EPD_INVALID_ARGUMENT, "m_splits", NULL);
    RESET(), t[4] = t[0], t[4].role = EPD_ROLE_DX;
    expect_refused(&layer, t, 5, EPD_INVALID_ARGUMENT, "dx", "grouped_gemm");
    RESET(), t[4] = t[0];
    expect_refused(&layer, t, 5, EPD_INVALID_ARGUMENT, "a", NULL);
    RESET(); /* after all of it the right one works */
    struct epd_plan_options options = {.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN};
    struct layer_tensor all[4] = {a, b, c, s};
    struct epd_plan *plan = layer_plan(&layer, options, all, 4);
    RANK_CHECK(epd_buffer_release(a.tensor.buffer) == EPD_IN_USE);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    ((int64_t *)s.data)[1] = 5; /* 8 rows of 7 */
    RANK_CHECK(layer_step(plan) == EPD_BAD_SPLITS);
    ((int64_t *)s.data)[0] = -1;
    RANK_CHECK(layer_step(plan) == EPD_BAD_SPLITS);
    epd_plan_destroy(plan);
    RANK_CHECK(epd_buffer_release(a.tensor.buffer) == EPD_OK);
    layer_close(&layer);
#undef RESET
}

START_TEST(wrong_bindings_name_the_tensor_and_the_property)
{
    run("bindings", bindings_rank);
}
END_TEST

static void routing_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    struct layer_tensor idx = layer_input(&layer, EPD_ROLE_TOPK_IDX);
    struct layer_tensor t[] = {layer_input(&layer, EPD_ROLE_X), idx, layer_output(&layer, EPD_ROLE_RECV_X),
                               layer_output(&layer, EPD_ROLE_M_SPLITS)};
    struct epd_plan *plan = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_DISPATCH}, t, 4);
    int64_t good = ((int64_t *)idx.data)[4 * 2];
    if (rank->rank == 1)
        ((int64_t *)idx.data)[4 * 2] = 77;
    RANK_CHECK(layer_step(plan) == EPD_BAD_ROUTING);
    struct epd_failure failure = {.size = sizeof(failure)};
    RANK_CHECK(epd_plan_failure(plan, &failure) == EPD_OK);
    RANK_CHECK(failure.rank == 1 && strstr(failure.text, "77") && strstr(failure.text, "token 4"));
    ((int64_t *)idx.data)[4 * 2] = good;
    RANK_CHECK(layer_step(plan) == EPD_OK);
    layer_close(&layer);
}

START_TEST(bad_routing_names_rank_token_and_value_and_the_next_step_works)
{
    run("routing", routing_rank);
}
END_TEST

static void memfd_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_buffer *buffer = NULL;
    layer_open(&layer, rank, &small);
    int fd = memfd_create("mine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    RANK_CHECK(fd >= 0 && ftruncate(fd, 65536) == 0);
    RANK_CHECK(epd_buffer_register_memfd(layer.group, fd, 0, 65536, &buffer) == EPD_INVALID_ARGUMENT);
    expect_text("seal", NULL);
    RANK_CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    RANK_CHECK(epd_buffer_register_memfd(layer.group, fd, 4096, 65536, &buffer) == EPD_OUT_OF_RANGE);
    RANK_CHECK(epd_buffer_register_memfd(layer.group, fd, UINT64_MAX - 4095, 8192, &buffer) ==
               EPD_OUT_OF_RANGE);
    RANK_CHECK(epd_buffer_register_memfd(layer.group, fd, 4096, 8192, &buffer) == EPD_OK);
    RANK_CHECK(epd_buffer_bytes(buffer) == 8192);
    RANK_CHECK(epd_buffer_register_cuda(layer.group, &layer, 16, &buffer) == EPD_UNSUPPORTED);
    close(fd);
    /* the daemon writes where the client reads: NT wgrad into the registered range */
    static const float dy[2 * 1] = {1, 2}, x[2 * 2] = {3, 4, 5, 6};
    static const int64_t splits[1] = {2};
    struct layer_tensor t[] = {layer_tensor(&layer, EPD_ROLE_A, EPD_F32, (int64_t[]){2, 1}, 2, dy),
                               layer_tensor(&layer, EPD_ROLE_B, EPD_F32, (int64_t[]){2, 2}, 2, x),
                               layer_tensor(&layer, EPD_ROLE_M_SPLITS, EPD_I64, (int64_t[]){1}, 1, splits),
                               {.tensor = {.role = EPD_ROLE_C,
                                           .buffer = buffer,
                                           .offset_bytes = 16,
                                           .dtype = EPD_F32,
                                           .n_dims = 3,
                                           .shape = {1, 1, 2}}}};
    struct epd_plan_options options = {.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_NT};
    struct epd_plan *plan = layer_plan(&layer, options, t, 4);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    const float *dw = (const float *)((const char *)epd_buffer_data(buffer) + 16);
    RANK_CHECK(dw[0] == 13 && dw[1] == 16);
    layer_close(&layer);
}

START_TEST(a_memfd_is_taken_only_sealed_and_in_range_and_results_alias_it)
{
    run("memfd", memfd_rank);
}
END_TEST

static void busy_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &small);
    struct epd_plan *plan = barrier_plan(&layer), *other = barrier_plan(&layer);
    if (rank->rank == 0) {
        RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_OK);
        RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_BUSY);
        RANK_CHECK(epd_plan_wait(plan, 50) == EPD_TIMEOUT);
        RANK_CHECK(epd_plan_capture(plan, NULL) == EPD_UNSUPPORTED);
        RANK_CHECK(epd_plan_arm(plan, 1) == EPD_UNSUPPORTED);
    } else {
        usleep(300 * 1000);
        RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_OK);
    }
    RANK_CHECK(epd_plan_wait(plan, 0) == EPD_OK);
    RANK_CHECK(layer_step(other) == EPD_OK);
    layer_close(&layer);
}

START_TEST(a_plan_in_flight_is_busy_and_a_wait_may_time_out)
{
    run("busy", busy_rank);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("errors");
    TCase *tests = tcase_create("errors");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, start, stop);
    tcase_add_test(tests, ranks_that_disagree_at_join_all_learn_the_field);
    tcase_add_test(tests, an_invalid_group_configuration_names_the_field);
    tcase_add_test(tests, a_missing_rank_is_named_at_the_deadline);
    tcase_add_test(tests, ranks_that_call_in_another_order_learn_it_at_once);
    tcase_add_test(tests, ranks_that_create_other_plans_learn_it);
    tcase_add_test(tests, a_killed_rank_is_named_and_the_next_group_works);
    tcase_add_test(tests, wrong_bindings_name_the_tensor_and_the_property);
    tcase_add_test(tests, bad_routing_names_rank_token_and_value_and_the_next_step_works);
    tcase_add_test(tests, a_memfd_is_taken_only_sealed_and_in_range_and_results_alias_it);
    tcase_add_test(tests, a_plan_in_flight_is_busy_and_a_wait_may_time_out);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
