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

static json_t *open_line(const struct report *report, const char *op)
{
    json_t *line = json_object();
    (void)json_object_set_new(line, "op", json_string(op));
    (void)json_object_set_new(line, "backend", json_string(report->backend));
    (void)json_object_set_new(line, "devices", json_integer(report->n_devices));
    (void)json_object_set_new(line, "version", json_string(epd_version()));
    (void)json_object_set_new(line, "time_unix", json_integer((json_int_t)time(NULL)));
    return line;
}

static void print_job_json(const struct report *report, const struct job *job, const struct result *result,
                           const struct result *solo)
{
    json_t *line = open_line(report, job_op_name(job->op));
    const double seconds = result->median_ns * 1e-9;
    (void)json_object_set_new(line, "case", json_string(job->case_name));
    (void)json_object_set_new(line, "dtype", json_string(job_dtype_name(job->dtype)));
    (void)json_object_set_new(line, "ranks", json_integer(job->n_ranks));
    (void)json_object_set_new(line, "tokens", json_integer(job->n_tokens));
    (void)json_object_set_new(line, "hidden", json_integer(job->hidden));
    (void)json_object_set_new(line, "ffn", json_integer(job->ffn));
    (void)json_object_set_new(line, "experts", json_integer(job->n_experts));
    (void)json_object_set_new(line, "top_k", json_integer(job->top_k));
    (void)json_object_set_new(line, "iterations", json_integer(job->n_iterations));
    add_real(line, "median_us", result->median_ns / 1000);
    add_real(line, "p99_us", result->p99_ns / 1000);
    add_real(line, "min_us", result->min_ns / 1000);
    (void)json_object_set_new(line, "slowest_rank", json_integer(result->slowest_rank));
    add_real(line, "slowest_rank_median_us", result->slowest_rank_median_ns / 1000);
    add_real(line, "wire_bytes", job_wire_bytes(job));
    add_real(line, "wire_gb_per_s", job_wire_bytes(job) * 1e-9 / seconds);
    add_real(line, "flops", job_flops(job));
    add_real(line, "all_ranks_gflop_per_s", job->n_ranks * job_flops(job) * 1e-9 / seconds);
    if (result->copied_bytes >= 0)
        add_real(line, "copied_bytes", result->copied_bytes);
    if (solo) {
        add_real(line, "one_process_median_us", solo->median_ns / 1000);
        add_real(line, "one_process_p99_us", solo->p99_ns / 1000);
        add_real(line, "ratio_to_one_process", result->median_ns / solo->median_ns);
    }
    print_json(line);
}

static void print_titles(struct report *report)
{
    if (!report->titles_printed)
        printf("%-21s %-10s %-5s %5s %12s %12s %7s %12s %12s %14s %6s\n", "op", "case", "dtype", "ranks",
               "median us", "p99 us", "slowest", "wire GB/s", "all GFLOP/s", "one process us", "ratio");
    report->titles_printed = 1;
}

void report_job(struct report *report, const struct job *job, const struct result *result,
                const struct result *solo)
{
    if (report->json) {
        print_job_json(report, job, result, solo);
        return;
    }
    const double seconds = result->median_ns * 1e-9;
    print_titles(report);
    printf("%-21s %-10s %-5s %5u %12.1f %12.1f %7u", job_op_name(job->op), job->case_name,
           job_dtype_name(job->dtype), job->n_ranks, result->median_ns / 1000, result->p99_ns / 1000,
           result->slowest_rank);
    if (job_wire_bytes(job) > 0)
        printf(" %12.2f", job_wire_bytes(job) * 1e-9 / seconds);
    else
        printf(" %12s", "-");
    if (job_flops(job) > 0)
        printf(" %12.1f", job->n_ranks * job_flops(job) * 1e-9 / seconds);
    else
        printf(" %12s", "-");
    if (solo)
        printf(" %14.1f %6.2f\n", solo->median_ns / 1000, result->median_ns / solo->median_ns);
    else
        printf(" %14s %6s\n", "-", "-");
    fflush(stdout);
}

void report_sessions(struct report *report, const struct sessions_result *result)
{
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
