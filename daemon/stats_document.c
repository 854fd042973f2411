#include "daemon/stats_document.h"

#include <dirent.h>
#include <stdio.h>
#include <unistd.h>

#include "daemon/document.h"
#include "daemon/member.h"
#include "daemon/session.h"

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static void set(json_t *object, const char *key, json_t *value)
{
    (void)json_object_set_new(object, key, value);
}

json_t *stats_limits_document(const struct worker *worker)
{
    json_t *object = json_object();
    for (int kind = 0; kind < QUOTA_KIND_COUNT; kind++)
        set(object, quota_name((enum quota_kind)kind), number(worker->accounts.n_hits[kind]));
    set(object, "launches_per_rank", number(worker->stats.window_full));
    set(object, "output_bytes", number(worker->stats.sessions_closed[CLOSE_SLOW_READER]));
    return object;
}

json_t *stats_devices_document(const struct worker *worker)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < node_n_devices(worker->node); i++) {
        struct device_info info;
        char uuid[2 * EPD_UUID_BYTES + 1];
        node_device_info(worker->node, i, &info);
        document_hex(info.uuid, EPD_UUID_BYTES, uuid);
        json_t *device = json_object();
        set(device, "device_idx", number(i));
        set(device, "uuid", json_string(uuid));
        set(device, "name", json_string(info.name));
        set(device, "memory_bytes", number(info.memory_bytes));
        set(device, "heap_bytes", number(info.heap_bytes));
        set(device, "heap_peak_bytes", number(info.heap_peak_bytes));
        set(device, "imported_bytes", number(info.imported_bytes));
        set(device, "n_imports", number(info.n_imports));
        set(device, "jobs_done", number(info.jobs_done));
        set(device, "jobs_queued", number(info.jobs_queued));
        set(device, "busy_ns", number(info.busy_ns));
        (void)json_array_append_new(list, device);
    }
    return list;
}

static json_t *sessions_document(const struct worker *worker)
{
    json_t *object = json_object(), *closed = json_object();
    const struct stats *stats = &worker->stats;
    for (int reason = 0; reason < CLOSE_REASON_COUNT; reason++)
        set(closed, close_reason_name((enum close_reason)reason), number(stats->sessions_closed[reason]));
    set(object, "open", number(registry_count(&worker->registry, REGISTRY_SESSION)));
    set(object, "opened", number(stats->sessions_opened));
    set(object, "refused", number(stats->sessions_refused));
    set(object, "closed", closed);
    return object;
}

/* {status name: n}, only those that happened. */
static json_t *statuses_document(const uint64_t counts[STATS_N_STATUSES])
{
    json_t *object = json_object();
    for (uint32_t status = 0; status < STATS_N_STATUSES; status++)
        if (counts[status])
            set(object, status_name((enum epd_status)status), number(counts[status]));
    return object;
}

static json_t *requests_document(const struct stats *stats)
{
    json_t *object = json_object();
    for (int kind = MESSAGE_HELLO; kind <= MESSAGE_CONTROL; kind++)
        set(object, message_kind_name((enum message_kind)kind), number(stats->requests[kind]));
    return object;
}

static json_t *histogram_document(const struct histogram *histogram)
{
    json_t *object = json_object();
    set(object, "count", number(histogram->count));
    set(object, "mean", number(histogram->count ? histogram->sum / histogram->count : 0));
    set(object, "p50", number(histogram_quantile(histogram, 0.50)));
    set(object, "p99", number(histogram_quantile(histogram, 0.99)));
    set(object, "max", number(histogram->max));
    return object;
}

static json_t *op_document(const struct stats_op *op, enum epd_op kind, const char *phases_name)
{
    json_t *object = json_object(), *phases = json_object();
    set(object, "op", json_string(op_name(kind)));
    set(object, "launches", number(op->launches));
    set(object, "failed", number(op->failed));
    set(object, "tokens", number(op->tokens));
    set(object, "rows", number(op->rows));
    set(object, "dropped_rows", number(op->dropped_rows));
    set(object, "wire_bytes", number(op->wire_bytes));
    set(object, "network_bytes", number(op->network_bytes));
    set(object, "copied_bytes", number(op->copied_bytes));
    set(object, "flops", number(op->flops));
    set(object, "gather_ns", histogram_document(&op->gather_ns));
    set(object, "run_ns", histogram_document(&op->run_ns));
    for (int phase = 1; phase < EPD_PHASE_COUNT; phase++)
        if (op->phase_ns[phase])
            set(phases, phase_name((enum epd_phase)phase), number(op->phase_ns[phase]));
    set(object, phases_name, phases);
    return object;
}

/* On a device that works by itself only the submission of a phase is timed on the host, and is called so. */
static json_t *ops_document(const struct stats *stats, const char *phases_name)
{
    json_t *list = json_array();
    for (int op = 1; op < EPD_OP_COUNT; op++)
        if (stats->ops[op].launches)
            (void)json_array_append_new(list, op_document(&stats->ops[op], (enum epd_op)op, phases_name));
    return list;
}

static json_t *ranks_document(const struct group *group)
{
    json_t *list = json_array();
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        const struct member *member = group->members[rank];
        if (!member)
            continue;
        json_t *object = json_object();
        set(object, "rank", number(rank));
        set(object, "came_last", number(member->came_last));
        set(object, "held_up_ns", number(member->held_up_ns));
        (void)json_array_append_new(list, object);
    }
    return list;
}

static json_t *rows_document(const struct load *load)
{
    json_t *rows = json_array();
    for (uint32_t e = 0; e < load->n_experts; e++)
        (void)json_array_append_new(rows, json_integer(load->expert_rows[e]));
    return rows;
}

static json_t *group_document(const struct group *group, int with_rows)
{
    json_t *object = json_object();
    const struct load *load = &group->load;
    set(object, "group_id", number(group->id));
    set(object, "name", json_string(group->name));
    set(object, "exchange", json_string(group->team && team_is_fused(group->team) ? "fused" : "staged"));
    set(object, "launches", number(group->n_launches));
    set(object, "failed", number(group->n_failed));
    set(object, "imbalance_last", json_real(load->imbalance_last));
    set(object, "imbalance_mean", json_real(load->n_steps ? load->imbalance_sum / (double)load->n_steps : 0));
    set(object, "hottest_expert", number(load_hottest(load)));
    if (with_rows)
        set(object, "expert_rows", rows_document(load));
    set(object, "ranks", ranks_document(group));
    return object;
}

static int is_member(const struct group *group, const struct session *session)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->session == session)
            return 1;
    return 0;
}

/* A rank is told of the groups of its uid, and row by row (which may be very many) of those that it is in. */
static json_t *groups_document(const struct worker *worker, const struct session *session)
{
    json_t *list = json_array();
    const int sees_all = session->kind == SESSION_CONTROL;
    list_each(node, after, &worker->groups)
    {
        const struct group *group = list_owner(node, struct group, in_worker);
        if (sees_all || group->uid == session->peer.uid)
            (void)json_array_append_new(list, group_document(group, sees_all || is_member(group, session)));
    }
    return list;
}

/* Resident bytes of this process; 0 if /proc is not there. */
static uint64_t rss_bytes(void)
{
    FILE *file = fopen("/proc/self/statm", "re");
    unsigned long pages = 0, resident = 0;
    if (!file)
        return 0;
    if (fscanf(file, "%lu %lu", &pages, &resident) != 2)
        resident = 0;
    (void)fclose(file);
    return (uint64_t)resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t open_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    if (!directory)
        return 0;
    uint64_t n = 0;
    while (readdir(directory))
        n++;
    (void)closedir(directory);
    return n > 3 ? n - 3 : 0; /* ".", ".." and the directory itself */
}

void stats_fill_document(const struct session *session, json_t *document)
{
    struct worker *worker = session->worker;
    const struct stats *stats = &worker->stats;
    set(document, "sessions", sessions_document(worker));
    set(document, "requests", requests_document(stats));
    set(document, "errors", statuses_document(stats->errors));
    set(document, "ops",
        ops_document(stats, node_backend(worker->node) == EPD_BACKEND_CUDA ? "submit_ns" : "phase_ns"));
    set(document, "failed_launches", statuses_document(stats->failed_launches));
    set(document, "groups", groups_document(worker, session));
    set(document, "limits_hit", stats_limits_document(worker));
    set(document, "devices", stats_devices_document(worker));
    set(document, "log_suppressed", number(worker->log->n_suppressed));
    set(document, "log_unwritten", number(worker->log->n_unwritten));
    set(document, "rss_bytes", number(rss_bytes()));
    set(document, "fds", number(open_fds()));
}
