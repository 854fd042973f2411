/* What epdctl prints for given documents: units, columns, and above all documents that lack keys or hold
 * other types. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/epdctl/bottleneck.h"
#include "client/epdctl/fabric_view.h"
#include "client/epdctl/list_view.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/stats_view.h"
#include "client/epdctl/status_view.h"
#include "client/epdctl/table.h"
#include "proto/mps.h"

static const char stats_text[] =
    "{'verb': 'stats', 'version': '0.1.0', 'uptime_ms': 10000, 'rss_bytes': 10485760, 'fds': 42,"
    " 'sessions': {'open': 4, 'opened': 9, 'closed': {'client': 5, 'dead': 0}},"
    " 'ops': [{'op': 'moe_forward', 'launches': 800, 'failed': 0, 'tokens': 204800, 'rows': 409600,"
    "          'dropped_rows': 0, 'wire_bytes': 78643200, 'network_bytes': 123000000, 'copied_bytes': 0, "
    "'flops': 2000000000,"
    "          'gather_ns': {'count': 200, 'mean': 3000000, 'p50': 2500000, 'p99': 9000000, 'max': 9900000},"
    "          'run_ns': {'count': 200, 'mean': 1000000, 'p50': 900000, 'p99': 4000000, 'max': 5000000},"
    "          'phase_ns': {'gemm': 100000000, 'combine': 25000000}},"
    "         {'op': 'barrier', 'launches': 0}],"
    " 'failed_launches': {'EPD_TIMEOUT': 3}, 'errors': {}, 'limits_hit': {'plans': 2},"
    " 'groups': [{'group_id': 1, 'name': 'train', 'launches': 800, 'failed': 3, 'imbalance_last': 1.25,"
    "             'imbalance_mean': 1.75, 'hottest_expert': 5, 'expert_rows': [1, 2],"
    "             'ranks': [{'rank': 0, 'came_last': 10, 'held_up_ns': 1000},"
    "                       {'rank': 2, 'came_last': 150, 'held_up_ns': 412000000}]}],"
    " 'devices': [{'device_idx': 0, 'name': 'host 0', 'uuid': '0123456789abcdef0123456789abcdef', "
    "'heap_bytes': 1536, 'heap_peak_bytes': 2097152,"
    "              'imported_bytes': 0, 'jobs_done': 12345678, 'jobs_queued': 0, 'busy_ns': 7100000000}]}";

/* Documents are written with ' for ", so that they can be read here. */
static json_t *parse(const char *text)
{
    char *copy = strdup(text);
    for (char *at = copy; *at; at++)
        if (*at == '\'')
            *at = '"';
    json_t *json = json_loads(copy, 0, NULL);
    ck_assert_ptr_nonnull(json);
    free(copy);
    return json;
}

struct output {
    char *text;
    size_t bytes;
    FILE *file;
};

static void output_open(struct output *output)
{
    output->file = open_memstream(&output->text, &output->bytes);
    ck_assert_ptr_nonnull(output->file);
}

static void output_close(struct output *output)
{
    fclose(output->file);
    free(output->text);
}

#define ASSERT_SAYS(output, wanted)                                                                          \
    do {                                                                                                     \
        fflush((output)->file);                                                                              \
        ck_assert_msg(strstr((output)->text, wanted) != NULL, "'%s' is not in:\n%s", wanted,                 \
                      (output)->text);                                                                       \
    } while (0)

START_TEST(quantities_have_units_and_three_figures)
{
    char text[QUANTITY_BYTES];
    ck_assert_str_eq(quantity_memory(text, 512), "512 B");
    ck_assert_str_eq(quantity_memory(text, 1536), "1.50 KiB");
    ck_assert_str_eq(quantity_memory(text, 123.4 * 1024 * 1024), "123 MiB");
    ck_assert_str_eq(quantity_duration(text, 830), "830 ns");
    ck_assert_str_eq(quantity_duration(text, 12345), "12.3 us");
    ck_assert_str_eq(quantity_duration(text, 999.6), "1.00 us");
    ck_assert_str_eq(quantity_duration(text, 2.5e9), "2.50 s");
    ck_assert_str_eq(quantity_age(text, 125000), "2 min 5 s");
    ck_assert_str_eq(quantity_age(text, 90000000), "1 d 1 h");
    ck_assert_str_eq(quantity_count(text, 1234567), "1234567");
    ck_assert_str_eq(quantity_count(text, 12345678), "12.3 M");
    ck_assert_str_eq(quantity_rate(text, 2500000, "B"), "2.50 MB/s");
    ck_assert_str_eq(quantity_share(text, 0.71), "71 %");
}
END_TEST

START_TEST(unknown_quantities_are_a_dash)
{
    char text[QUANTITY_BYTES];
    ck_assert_str_eq(quantity_memory(text, NAN), "-");
    ck_assert_str_eq(quantity_duration(text, NAN), "-");
    ck_assert_str_eq(quantity_age(text, NAN), "-");
    ck_assert_str_eq(quantity_count(text, INFINITY), "-");
    ck_assert_str_eq(quantity_rate(text, NAN, "B"), "-");
}
END_TEST

START_TEST(table_columns_are_as_wide_as_their_contents)
{
    struct table table;
    struct output output;
    output_open(&output);
    table_init(&table, "name,>count,text");
    table_add(&table, "a long name");
    table_add(&table, "7");
    table_add(&table, "x");
    table_add(&table, "b");
    table_add(&table, "123456");
    table_add(&table, NULL);
    table_print(&table, output.file);
    ASSERT_SAYS(&output, "name          count  text\n"
                         "a long name       7  x\n"
                         "b            123456  -\n");
    table_fini(&table);
    output_close(&output);
}
END_TEST

START_TEST(stats_say_what_how_fast_and_what_holds_back)
{
    struct output output;
    json_t *stats = parse(stats_text);
    output_open(&output);
    stats_view(stats, NULL, output.file);
    ASSERT_SAYS(&output, "epd 0.1.0, up 10 s");
    ASSERT_SAYS(&output, "sessions 4 open, 9 since the start; daemon memory 10.0 MiB, open files 42");
    ASSERT_SAYS(&output, "moe_forward       800       0        0     0 B        80/s  20.5 k/s  41.0 k/s  "
                         "7.86 MB/s  12.3 MB/s  20.0 GFLOP/s");
    ASSERT_SAYS(&output, "2.50 ms   9.00 ms   900 us  4.00 ms  5.00 ms");
    ck_assert_msg(!strstr(output.text, "barrier"), "an op that never ran is listed");
    ASSERT_SAYS(&output, "host 0  71 %  1.50 KiB");
    ASSERT_SAYS(
        &output,
        "holds back: 75 % of a step is waiting for the last rank to ask; rank 2 of group \"train\" came "
        "last in 150 of 800 steps and held the others up for 412 ms");
    ASSERT_SAYS(&output, "the busiest gets 1.75x the mean, mostly expert 5");
    ASSERT_SAYS(&output, "where the time of a step went since the start\n"
                         "op           mean step  wait  gemm  combine  lanes wait\n"
                         "moe_forward    4.00 ms  75 %   3 %      1 %        21 %\n");
    ASSERT_SAYS(&output, "bottleneck: waiting for the last rank to ask, 75 % of a step\n");
    ASSERT_SAYS(&output, "failed launches: EPD_TIMEOUT 3\n");
    devices_view(stats, output.file);
    ASSERT_SAYS(&output, "host 0  01234567-89ab-cdef-0123-456789abcdef");
    ASSERT_SAYS(&output, "limits hit, times: plans 2\n");
    ASSERT_SAYS(&output, "sessions closed, by reason: client 5\n");
    output_close(&output);
    json_decref(stats);
}
END_TEST

START_TEST(watched_stats_are_rates_between_two_documents)
{
    struct output output;
    json_t *before = parse(stats_text), *now = parse(stats_text);
    json_t *op = json_array_get(json_object_get(now, "ops"), 0);
    json_object_set_new(now, "uptime_ms", json_integer(12000));
    json_object_set_new(op, "launches", json_integer(1800));
    json_object_set_new(op, "tokens", json_integer(204800 + 512000));
    json_t *run = json_object_get(op, "run_ns");
    json_object_set_new(run, "count", json_integer(450)); /* 250 steps more, of 4 ms each */
    json_object_set_new(run, "mean", json_integer(1200000000 / 450));
    json_object_set_new(json_object_get(op, "phase_ns"), "gemm", json_integer(100000000 + 3200000000));
    json_t *late =
        json_array_get(json_object_get(json_array_get(json_object_get(now, "groups"), 0), "ranks"), 0);
    json_object_set_new(late, "came_last", json_integer(10 + 100));
    json_object_set_new(late, "held_up_ns", json_integer(1000 + 30000000));
    json_object_set_new(json_array_get(json_object_get(now, "groups"), 0), "launches", json_integer(1050));
    output_open(&output);
    stats_view(now, before, output.file);
    ASSERT_SAYS(&output, "rates and late ranks: of the last 2.00 s");
    ASSERT_SAYS(&output, "moe_forward      1800       0        0     0 B       500/s   256 k/s     0/s");
    ASSERT_SAYS(&output, " 1050    125/s ");
    ASSERT_SAYS(&output, "     0     40 %  30.0 ms"); /* rank 0, late in 100 of 250 steps */
    ASSERT_SAYS(&output, "in the last 2.00 s\n"
                         "op           mean step  wait  gemm  combine  lanes wait\n"
                         "moe_forward    4.00 ms   0 %  80 %      0 %        20 %\n");
    ASSERT_SAYS(&output, "bottleneck: phase gemm, 80 % of a step\n");
    ck_assert_msg(!strstr(output.text, "waiting for the last rank"), "what was before is said to be now");
    output_close(&output);
    json_decref(before);
    json_decref(now);
}
END_TEST

/* What training has left behind is still told of, and not as nothing at all. */
START_TEST(stats_of_an_idle_daemon_tell_where_time_went_since_the_start)
{
    struct output output;
    json_t *before = parse(stats_text), *now = parse(stats_text);
    json_object_set_new(now, "uptime_ms", json_integer(11000));
    output_open(&output);
    stats_view(now, before, output.file);
    ASSERT_SAYS(&output, "nothing was launched in the last 1.00 s: everything is since the start\n");
    ASSERT_SAYS(&output, "     800       0        0     0 B      72.7/s");
    ASSERT_SAYS(&output, "where the time of a step went since the start\n");
    ASSERT_SAYS(&output, "bottleneck: waiting for the last rank to ask, 75 % of a step\n");
    output_close(&output);
    json_decref(before);
    json_decref(now);
}
END_TEST

/* A device that works by itself: the host knows no phases. */
START_TEST(steps_without_known_phases_are_work_on_the_device)
{
    struct output output;
    json_t *stats =
        parse("{'uptime_ms': 1000, 'ops': [{'op': 'dispatch', 'launches': 40, 'submit_ns': {'dispatch': 9},"
              " 'gather_ns': {'count': 10, 'mean': 1000}, 'run_ns': {'count': 10, 'mean': 9000}}]}");
    output_open(&output);
    stats_view(stats, NULL, output.file);
    ASSERT_SAYS(&output, "op        mean step  wait  device\n"
                         "dispatch    10.0 us  10 %    90 %\n");
    ASSERT_SAYS(&output, "bottleneck: work on the device, with its queue, 90 % of a step\n");
    output_close(&output);
    json_decref(stats);
}
END_TEST

START_TEST(mps_is_found_where_the_environment_says)
{
    char directory[] = "/tmp/epd-mps-XXXXXX", path[64], found[64];
    ck_assert_ptr_nonnull(mkdtemp(directory));
    setenv("CUDA_MPS_PIPE_DIRECTORY", directory, 1);
    (void)snprintf(path, sizeof(path), "%s/control", directory);
    ck_assert_int_eq(mps_find(found, sizeof(found)), 0);
    ck_assert_str_eq(found, path);
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    fclose(file);
    ck_assert_int_eq(mps_find(found, sizeof(found)), 1);
    unlink(path);
    rmdir(directory);
    unsetenv("CUDA_MPS_PIPE_DIRECTORY");
    (void)mps_find(found, sizeof(found));
    ck_assert_str_eq(found, "/tmp/nvidia-mps/control");
}
END_TEST

START_TEST(views_survive_documents_without_anything)
{
    static const char *const texts[] = {
        "{}",
        "{'ops': 3, 'groups': {}, 'sessions': [], 'devices': 'x', 'plans': null, 'limits_hit': 7}",
        "{'ops': [1, {}, null], 'groups': [1, {}, {'ranks': 3}], 'sessions': [{}, 7], 'devices': [{}], "
        "'plans': [[]],"
        " 'limits_hit': {'a': 'b'}, 'config': [{}, 2]}",
        "{'ops': [{'op': 5, 'launches': 'many', 'phase_ns': [], 'gather_ns': 3}], 'uptime_ms': 'long'}",
        "{'ops': [{'op': 'x', 'launches': 5}], 'groups': [{'ranks': [{}, 7]}]}",
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        struct output output;
        json_t *document = parse(texts[i]);
        output_open(&output);
        status_view(document, 1, output.file);
        stats_view(document, NULL, output.file);
        stats_view(document, document, output.file);
        clients_view(document, output.file);
        groups_view(document, output.file);
        plans_view(document, output.file);
        devices_view(document, output.file);
        dump_view(document, 40, output.file);
        fabric_view(document, NULL, output.file);
        fflush(output.file);
        ck_assert_msg(!strstr(output.text, "nan"), "not a number in:\n%s", output.text);
        ck_assert_msg(!strstr(output.text, "(null)"), "a null in:\n%s", output.text);
        output_close(&output);
        json_decref(document);
    }
}
END_TEST

START_TEST(lists_show_dashes_for_unknown_keys)
{
    struct output output;
    json_t *document = parse("{'sessions': [{'session_id': 7, 'name': 'rank 3', 'connected_ms': 65000}]}");
    output_open(&output);
    clients_view(document, output.file);
    ASSERT_SAYS(&output, "id  name    kind  state");
    ASSERT_SAYS(&output, " 7  rank 3  -     -");
    ASSERT_SAYS(&output, "1 min 5 s");
    output_close(&output);
    json_decref(document);
}
END_TEST

START_TEST(groups_show_the_awaited_rank)
{
    struct output output;
    json_t *document =
        parse("{'groups': [{'group_id': 3, 'name': 'g', 'state': 'open', 'world_size': 2, 'dtype': 'f32', "
              "'hidden': 64,"
              " 'ffn': 128, 'n_experts': 8, 'top_k': 2, 'max_tokens': 256, 'capacity_rows': 1024, "
              "'overflow': 'error',"
              " 'epoch': 1, 'deadline_ms': 20000, 'launches': 5, 'failed': 0, 'in_flight': 1,"
              " 'unrecorded_plans': 2, 'unrecorded_reason': 'capture refused',"
              " 'ranks': [{'rank': 0, 'present': true, 'queued': 1, 'waiting_for': false},"
              "           {'rank': 1, 'present': false, 'queued': 0, 'waiting_for': true}]}]}");
    output_open(&output);
    groups_view(document, output.file);
    ASSERT_SAYS(&output,
                "group 3 \"g\": open, 2 ranks, f32, hidden 64, ffn 128, 8 experts, top-2, up to 256 tokens");
    ASSERT_SAYS(&output, "capacity 1024 rows, overflow error, epoch 1, deadline 20.0 s");
    ASSERT_SAYS(&output, "graphs is on: 2 (capture refused)");
    ASSERT_SAYS(&output, "     1  no ");
    output_close(&output);
    json_decref(document);
}
END_TEST

START_TEST(dump_names_missing_ranks_and_keeps_the_newest)
{
    struct output output;
    json_t *document = parse(
        "{'ops': [{'serial': 1, 'op': 'dispatch', 'text': 'old'}, {'serial': 2, 'op': 'combine', 'state': "
        "'gathering', 'missing': [1, 3], 'rank': -1, 'phase_ns': {'route': 5, 'gemm': 382761}, 'text': 'rank "
        "1 is missing'}]}");
    output_open(&output);
    dump_view(document, 1, output.file);
    ASSERT_SAYS(&output, "gemm 383 us    1 3      rank 1 is missing");
    ck_assert_msg(!strstr(output.text, "old"), "an older step is shown:\n%s", output.text);
    output_close(&output);
    json_decref(document);
}
END_TEST

START_TEST(dump_does_not_say_how_a_step_ended_that_runs)
{
    struct output output;
    json_t *document = parse(
        "{'ops': [{'serial': 1, 'op': 'combine', 'state': 'running', 'status': 'EPD_OK', 'phase': 'none', "
        "'rank': -1, 'gather_ns': 2000, 'wait_ns': 3000, 'run_ns': 0, 'text': 'x'}]}");
    output_open(&output);
    dump_view(document, 1, output.file);
    ASSERT_SAYS(&output, "running  -       -             -    -  2.00 us  3.00 us    -  -");
    output_close(&output);
    json_decref(document);
}
END_TEST

START_TEST(status_without_a_worker_says_when_the_next_starts)
{
    struct output output;
    json_t *document = parse("{'version': '0.1.0', 'pid': 0, 'worker': 'waiting', 'last_exit': 'signal 9',"
                             " 'restart_in_ms': 400, 'failures': 3}");
    output_open(&output);
    status_view(document, 0, output.file);
    ASSERT_SAYS(&output, "no worker serves (waiting)");
    ASSERT_SAYS(&output, "signal 9");
    ASSERT_SAYS(&output, "400 ms");
    output_close(&output);
    json_decref(document);
}
END_TEST

/* It is there, and nobody knows yet when the next one starts. */
START_TEST(status_of_a_worker_that_hangs_names_no_next_start)
{
    struct output output;
    json_t *document = parse("{'version': '0.1.0', 'pid': 0, 'worker': 'stuck', 'last_exit': '', 'hangs': 2,"
                             " 'restart_in_ms': 0, 'failures': 0}");
    output_open(&output);
    status_view(document, 0, output.file);
    ASSERT_SAYS(&output, "no worker serves (stuck)");
    ASSERT_SAYS(&output, "ended for hangs 2\n");
    ck_assert_msg(!strstr(output.text, "next start"), "a start that nobody plans:\n%s", output.text);
    output_close(&output);
    json_decref(document);
}
END_TEST

/* Groups of some of the nodes, one of them still without any. */
START_TEST(fabric_shows_which_nodes_a_group_has)
{
    static const char text[] =
        "{'n_nodes': 4, 'node': 3, 'nodes': [], 'groups': ["
        " {'group_id': 1, 'name': 'two', 'state': 'open', 'n_nodes': 2, 'nodes': [3, 0], 'steps': 7,"
        "  'rails': {'nodes': [{'node': 0, 'sent_bytes': 1, 'received_bytes': 1}]}},"
        " {'group_id': 2, 'name': 'later', 'state': 'joined', 'n_nodes': 3, 'nodes': [], 'steps': 0},"
        " {'group_id': 3, 'name': 'whole', 'state': 'joined', 'n_nodes': 4, 'nodes': []}]}";
    struct output output;
    json_t *document = parse(text);
    output_open(&output);
    fabric_view(document, NULL, output.file);
    fflush(output.file);
    ASSERT_SAYS(&output, "3,0");
    ASSERT_SAYS(&output, "any 3");
    ASSERT_SAYS(&output, "all");
    output_close(&output);
    json_decref(document);
}
END_TEST

static const char fabric_text[] =
    "{'n_nodes': 2, 'node': 0, 'rendezvous': 'h:7741', 'complete': true, 'fabric_epoch': 3, 'last_error': '',"
    " 'uptime_ms': 4000, 'agreement': {'steps': 200, 'mean_ns': 50000, 'max_ns': 900000, 'ahead': 150},"
    " 'nodes': [{'node': 0, 'state': 'self', 'linked': false, 'address': '', 'version': '0.1.0', 'since_ms': "
    "9000,"
    "            'rtt_ns': 0, 'losses': 0, 'sent_bytes': 0, 'received_bytes': 0, 'last_error': ''},"
    "           {'node': 1, 'state': 'present', 'linked': true, 'address': '10.0.0.2:4', 'version': '0.1.0',"
    "            'since_ms': 60000, 'rtt_ns': 120000, 'losses': 2, 'sent_bytes': 2048, 'received_bytes': "
    "1024,"
    "            'last_error': ''}],"
    " 'groups': [{'group_id': 5, 'name': 'train', 'state': 'open', 'n_nodes': 2, 'nodes': [0, 1],"
    "             'first_rank': 0, 'n_ranks': 2, 'steps': 200,"
    "             'announced': 3, 'rails': {'swaps': 400, 'swap_ns': 2000000000,"
    "             'nodes': [{'node': 1, 'sent_bytes': 3000000, 'received_bytes': 1000000}]}}]}";

START_TEST(fabric_shows_nodes_rails_and_agreements)
{
    struct output output;
    json_t *document = parse(fabric_text), *before = parse(fabric_text);
    output_open(&output);
    fabric_view(document, NULL, output.file);
    fflush(output.file);
    ck_assert_ptr_nonnull(strstr(output.text, "node 0 of 2, complete, epoch 3, rendezvous h:7741"));
    ck_assert_ptr_nonnull(strstr(output.text, "50.0 us on average, 900 us at most; 75 %"));
    ck_assert_ptr_nonnull(strstr(output.text, "10.0.0.2:4"));
    ck_assert_ptr_nonnull(strstr(output.text, "2.00 MB/s")); /* 4 MB in 2 s of swaps */
    ck_assert_ptr_nonnull(strstr(output.text, "5.00 ms"));   /* a swap */
    output_close(&output);
    json_t *rail = json_array_get(
        json_object_get(json_object_get(json_array_get(json_object_get(before, "groups"), 0), "rails"),
                        "nodes"),
        0);
    json_object_set_new(rail, "sent_bytes", json_integer(0));
    json_object_set_new(before, "uptime_ms", json_integer(1000));
    output_open(&output);
    fabric_view(document, before, output.file);
    fflush(output.file);
    ck_assert_ptr_nonnull(strstr(output.text, "1.00 MB/s")); /* 3 MB in the 3 s between */
    output_close(&output);
    json_object_set_new(json_object_get(json_array_get(json_object_get(document, "groups"), 0), "rails"),
                        "transport", json_string("nccl"));
    output_open(&output);
    fabric_view(document, NULL, output.file);
    fflush(output.file);
    ck_assert_ptr_nonnull(strstr(output.text, "nccl"));
    ck_assert_ptr_null(strstr(output.text, "2.00 MB/s")); /* the host does not know how long swaps took */
    output_close(&output);
    json_decref(document);
    json_decref(before);
}
END_TEST

static Suite *views_suite(void)
{
    Suite *suite = suite_create("epdctl views");
    TCase *tcase = tcase_create("all");
    tcase_add_test(tcase, quantities_have_units_and_three_figures);
    tcase_add_test(tcase, unknown_quantities_are_a_dash);
    tcase_add_test(tcase, table_columns_are_as_wide_as_their_contents);
    tcase_add_test(tcase, stats_say_what_how_fast_and_what_holds_back);
    tcase_add_test(tcase, watched_stats_are_rates_between_two_documents);
    tcase_add_test(tcase, stats_of_an_idle_daemon_tell_where_time_went_since_the_start);
    tcase_add_test(tcase, steps_without_known_phases_are_work_on_the_device);
    tcase_add_test(tcase, mps_is_found_where_the_environment_says);
    tcase_add_test(tcase, views_survive_documents_without_anything);
    tcase_add_test(tcase, lists_show_dashes_for_unknown_keys);
    tcase_add_test(tcase, groups_show_the_awaited_rank);
    tcase_add_test(tcase, dump_names_missing_ranks_and_keeps_the_newest);
    tcase_add_test(tcase, dump_does_not_say_how_a_step_ended_that_runs);
    tcase_add_test(tcase, fabric_shows_nodes_rails_and_agreements);
    tcase_add_test(tcase, fabric_shows_which_nodes_a_group_has);
    tcase_add_test(tcase, status_without_a_worker_says_when_the_next_starts);
    tcase_add_test(tcase, status_of_a_worker_that_hangs_names_no_next_start);
    suite_add_tcase(suite, tcase);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(views_suite());
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
