#include "client/bench/report.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static void print_json(json_t *line)
{
    char *text = json_dumps(line, JSON_REAL_PRECISION(6));
    printf("%s\n", text ? text : "{}");
    fflush(stdout);
    free(text);
    json_decref(line);
}

static void add_real(json_t *line, const char *key, double value)
{
    (void)json_object_set_new(line, key, json_real(value));
}

/* A whole number, to its last digit. */
static void add_count(json_t *line, const char *key, double value)
{
    (void)json_object_set_new(line, key, json_integer((json_int_t)value));
}

static json_t *open_line(const struct report *report, const char *op)
{
    json_t *line = json_object();
    (void)json_object_set_new(line, "op", json_string(op));
    (void)json_object_set_new(line, "backend", json_string(report->backend));
    (void)json_object_set_new(line, "devices", json_integer(report->n_devices));
    (void)json_object_set_new(line, "device", json_string(report->device));
    if (report->mps >= 0)
        (void)json_object_set_new(line, "mps", json_boolean(report->mps));
    (void)json_object_set_new(line, "version", json_string(epd_version()));
    (void)json_object_set_new(line, "time_unix", json_integer((json_int_t)time(NULL)));
    return line;
}

static void add_job(json_t *line, const struct job *job)
{
    (void)json_object_set_new(line, "case", json_string(job->case_name));
    (void)json_object_set_new(line, "dtype", json_string(job_dtype_name(job->dtype)));
    (void)json_object_set_new(line, "ranks", json_integer(job->n_ranks));
    (void)json_object_set_new(line, "tokens", json_integer(job->n_tokens));
    (void)json_object_set_new(line, "hidden", json_integer(job->hidden));
    (void)json_object_set_new(line, "ffn", json_integer(job->ffn));
    (void)json_object_set_new(line, "experts", json_integer(job->n_experts));
    (void)json_object_set_new(line, "top_k", json_integer(job->top_k));
    (void)json_object_set_new(line, "capacity_rows", json_integer(job->capacity_rows));
    add_real(line, "zipf", job->zipf);
}

static void add_traffic(json_t *line, const struct report *report, const struct traffic *traffic,
                        double seconds)
{
    const double wire = traffic->wire_bytes * 1e-9 / seconds;
    add_count(line, "wire_bytes", traffic->wire_bytes);
    add_real(line, "wire_gb_per_s", wire);
    add_count(line, "moved_bytes", traffic->moved_bytes);
    add_real(line, "moved_gb_per_s", traffic->moved_bytes * 1e-9 / seconds);
    add_count(line, "received_rows", traffic->rows);
    if (report->link_gb_per_s > 0) {
        add_real(line, "link_gb_per_s", report->link_gb_per_s);
        add_real(line, "link_fraction", wire / report->link_gb_per_s);
    }
}

static void add_cuda(json_t *line, const struct job *job, const struct result *result)
{
    add_real(line, "launch_us", result->launch_ns / 1000);
    add_real(line, "client_kernel_us", job->client_kernel_us);
    (void)json_object_set_new(line, "memory", json_string(job->heap_memory ? "heap" : "own"));
    if (result->memory_bytes >= 0)
        add_count(line, "group_bytes_per_rank", result->memory_bytes);
}

/* What a rank's rail carries in a launch, by the routing and as the daemon counts it. */
static void add_nodes(json_t *line, const struct job *job, const struct result *result,
                      const struct traffic *traffic)
{
    (void)json_object_set_new(line, "nodes", json_integer(job->n_nodes));
    if (job->crossing)
        (void)json_object_set_new(line, "crossing",
                                  json_string(job->crossing == EPD_CROSSING_EAGER ? "eager" : "static"));
    add_real(line, "agreement_mean_us", result->agreement_ns / 1000);
    add_count(line, "agreed_steps", result->n_agreed);
    add_count(line, "agreed_ahead", result->n_ahead);
    add_count(line, "network_tokens_bytes", traffic->network_bytes);
    if (result->counted.launches > 0 && result->counted.network_bytes >= 0)
        add_count(line, "network_bytes", result->counted.network_bytes / result->counted.launches);
}

static void print_job_json(const struct report *report, const struct job *job, const struct result *result,
                           const struct traffic *traffic, const struct result *solo)
{
    json_t *line = open_line(report, job_op_name(job->op));
    const double seconds = result->median_ns * 1e-9;
    add_job(line, job);
    (void)json_object_set_new(line, "iterations", json_integer(job->n_iterations));
    add_real(line, "median_us", result->median_ns / 1000);
    add_real(line, "p10_us", result->p10_ns / 1000);
    add_real(line, "p90_us", result->p90_ns / 1000);
    add_real(line, "p99_us", result->p99_ns / 1000);
    add_real(line, "min_us", result->min_ns / 1000);
    (void)json_object_set_new(line, "slowest_rank", json_integer(result->slowest_rank));
    add_real(line, "slowest_rank_median_us", result->slowest_rank_median_ns / 1000);
    if (job->backend == EPD_BACKEND_CUDA)
        add_cuda(line, job, result);
    if (traffic->moved_bytes > 0)
        add_traffic(line, report, traffic, seconds);
    add_count(line, "flops", job_flops(job));
    add_real(line, "all_ranks_gflop_per_s", job->n_ranks * job_flops(job) * 1e-9 / seconds);
    if (result->counted.copied_bytes >= 0)
        add_count(line, "copied_bytes", result->counted.copied_bytes);
    if (job->n_nodes > 1)
        add_nodes(line, job, result, traffic);
    if (solo) {
        add_real(line, "one_process_median_us", solo->median_ns / 1000);
        add_real(line, "one_process_p99_us", solo->p99_ns / 1000);
        add_real(line, "ratio_to_one_process", result->median_ns / solo->median_ns);
    }
    print_json(line);
}

static void print_titles(struct report *report, const struct job *job)
{
    if (!report->titles_printed)
        printf("%-21s %-10s %-5s %5s %10s %10s %10s %10s %9s %10s %7s %11s %s\n", "op", "case", "dtype",
               "ranks", "median us", "p10 us", "p90 us", "p99 us", "wire GB/s", "moved GB/s", "of link",
               "GFLOP/s", job->backend == EPD_BACKEND_CUDA ? "launch us  MiB" : "one process us  ratio");
    report->titles_printed = 1;
}

/* A column of a table: a number, or a dash where there is none. */
static void print_number(int width, int digits, double value, int there)
{
    if (there)
        printf(" %*.*f", width, digits, value);
    else
        printf(" %*s", width, "-");
}

/* A host moves some MB/s in a layer, a GPU hundreds of GB/s. */
static int rate_digits(double gb_per_s)
{
    return gb_per_s < 10 ? 3 : 1;
}

static void print_job_row(struct report *report, const struct job *job, const struct result *result,
                          const struct traffic *traffic, const struct result *solo)
{
    const double seconds = result->median_ns * 1e-9, wire = traffic->wire_bytes * 1e-9 / seconds;
    print_titles(report, job);
    printf("%-21s %-10s %-5s %5u %10.1f %10.1f %10.1f %10.1f", job_op_name(job->op), job->case_name,
           job_dtype_name(job->dtype), job->n_ranks, result->median_ns / 1000, result->p10_ns / 1000,
           result->p90_ns / 1000, result->p99_ns / 1000);
    const double moved = traffic->moved_bytes * 1e-9 / seconds;
    print_number(9, rate_digits(wire), wire, traffic->wire_bytes > 0);
    print_number(10, rate_digits(moved), moved, traffic->moved_bytes > 0);
    print_number(7, 2, wire / report->link_gb_per_s, wire > 0 && report->link_gb_per_s > 0);
    print_number(11, 1, job->n_ranks * job_flops(job) * 1e-9 / seconds, job_flops(job) > 0);
    if (job->backend == EPD_BACKEND_CUDA) {
        print_number(9, 2, result->launch_ns / 1000, 1);
        print_number(4, 0, result->memory_bytes / (1 << 20), result->memory_bytes >= 0);
    } else {
        print_number(14, 1, solo ? solo->median_ns / 1000 : 0, solo != NULL);
        print_number(6, 2, solo ? result->median_ns / solo->median_ns : 0, solo != NULL);
    }
    if (result->n_agreed > 0)
        printf("  %u nodes, agreed in %.1f us, %.0f%% ahead", job->n_nodes, result->agreement_ns / 1000,
               100 * result->n_ahead / result->n_agreed);
    if (result->n_agreed > 0 && result->counted.launches > 0)
        printf(", a rail carried %.3f MB", result->counted.network_bytes / result->counted.launches * 1e-6);
    printf("\n");
    fflush(stdout);
}

void report_job(struct report *report, const struct job *job, const struct result *result,
                const struct traffic *traffic, const struct result *solo)
{
    report->n_results++;
    if (report->json)
        print_job_json(report, job, result, traffic, solo);
    else
        print_job_row(report, job, result, traffic, solo);
}

void report_link(struct report *report, double gb_per_s)
{
    report->n_results++;
    report->link_gb_per_s = gb_per_s;
    if (!report->json) {
        printf("link: %.1f GB/s leave each of %u GPUs while all store to all others\n", gb_per_s,
               report->n_devices);
        fflush(stdout);
        return;
    }
    json_t *line = open_line(report, "link");
    add_real(line, "link_gb_per_s", gb_per_s);
    print_json(line);
}

static void report_times(struct report *report, const struct job *job, const char *what,
                         const struct loss_times *times)
{
    if (!report->json) {
        printf("peer_loss %-8s p50 %9.2f ms  p99 %9.2f ms  max %9.2f ms  (%u rounds of %u ranks, case %s)\n",
               what, times->p50_ns * 1e-6, times->p99_ns * 1e-6, times->max_ns * 1e-6, times->n, job->n_ranks,
               job->case_name);
        fflush(stdout);
        return;
    }
    json_t *line = open_line(report, "peer_loss");
    add_job(line, job);
    (void)json_object_set_new(line, "time", json_string(what));
    (void)json_object_set_new(line, "rounds", json_integer(times->n));
    add_real(line, "p50_ms", times->p50_ns * 1e-6);
    add_real(line, "p99_ms", times->p99_ns * 1e-6);
    add_real(line, "max_ms", times->max_ns * 1e-6);
    print_json(line);
}

void report_loss(struct report *report, const struct job *job, const struct loss_result *result)
{
    report->n_results++;
    report_times(report, job, "told", &result->told);
    report_times(report, job, "reclaim", &result->reclaim);
    report_times(report, job, "serve", &result->serve);
}

void report_failure(const struct report *report, const char *op, const struct job *job,
                    enum epd_status status)
{
    if (!report->json)
        return;
    json_t *line = open_line(report, op);
    if (job)
        add_job(line, job);
    (void)json_object_set_new(line, "failed", json_string(epd_status_name(status)));
    print_json(line);
}

void report_sessions(struct report *report, const struct sessions_result *result)
{
    report->n_results++;
    if (!report->json) {
        printf(
            "%u idle sessions: %.1f KiB each (%.1f KiB of the worker's own, %.1f KiB shared page), %.2f open "
            "files each\n",
            result->n_sessions, (result->anon_bytes_per_session + result->shared_bytes_per_session) / 1024,
            result->anon_bytes_per_session / 1024, result->shared_bytes_per_session / 1024,
            result->fds_per_session);
        printf("idle daemon: %.4f %% of a processor with one session, %.4f %% with all\n",
               result->idle_empty_share * 100, result->idle_full_share * 100);
        return;
    }
    json_t *line = open_line(report, "sessions");
    (void)json_object_set_new(line, "sessions", json_integer(result->n_sessions));
    add_real(line, "bytes_per_session", result->anon_bytes_per_session + result->shared_bytes_per_session);
    add_real(line, "anon_bytes_per_session", result->anon_bytes_per_session);
    add_real(line, "shared_bytes_per_session", result->shared_bytes_per_session);
    add_real(line, "fds_per_session", result->fds_per_session);
    add_real(line, "idle_cpu_share_one_session", result->idle_empty_share);
    add_real(line, "idle_cpu_share_all_sessions", result->idle_full_share);
    print_json(line);
}
