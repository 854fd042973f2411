#include "daemon/control.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/document.h"
#include "daemon/group_span.h"
#include "daemon/member.h"
#include "daemon/rank_plan.h"
#include "daemon/stats_document.h"
#include "proto/mps.h"

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static void set(json_t *object, const char *key, json_t *value)
{
    (void)json_object_set_new(object, key, value);
}

static json_t *hex(const uint8_t *data, size_t bytes)
{
    char text[65];
    document_hex(data, bytes < 32 ? bytes : 32, text);
    return json_string(text);
}

/* What every document says. */
static json_t *header(const struct worker *worker, const char *verb)
{
    json_t *document = json_object();
    set(document, "verb", json_string(verb));
    set(document, "version", json_string(EPD_VERSION));
    set(document, "pid", number((uint64_t)getpid()));
    set(document, "boot_id", hex(worker->boot_id, sizeof(worker->boot_id)));
    set(document, "epoch", number(worker->epoch));
    set(document, "time_unix_ms", number(clock_unix_ms()));
    set(document, "uptime_ms", number((clock_ns() - worker->started_ns) / CLOCK_NS_PER_MS));
    return document;
}

/* ---- status ---- */

static json_t *config_document(const struct config *config)
{
    json_t *list = json_array();
    size_t n_keys = 0;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++) {
        char value[CONFIG_TEXT_BYTES];
        config_format(config, &keys[i], value, sizeof(value));
        json_t *key = json_object();
        set(key, "section", json_string(keys[i].section));
        set(key, "key", json_string(keys[i].key));
        set(key, "value", json_string(value));
        set(key, "default", json_string(keys[i].fallback));
        set(key, "reloadable", json_boolean(keys[i].reloadable));
        set(key, "help", json_string(keys[i].help));
        (void)json_array_append_new(list, key);
    }
    return list;
}

static uint64_t launches_waiting(const struct worker *worker)
{
    uint64_t n = worker->n_flights;
    list_each(node, after, &worker->groups)
    {
        const struct group *group = list_owner(node, struct group, in_worker);
        for (uint32_t rank = 0; rank < group->world_size; rank++)
            n += group->members[rank] ? group->members[rank]->queue.count : 0;
    }
    return n;
}

static json_t *queues_document(const struct worker *worker)
{
    json_t *object = json_object(), *devices = json_array();
    for (uint32_t i = 0; i < node_n_devices(worker->node); i++)
        (void)json_array_append_new(devices, number(quota_device_queues(&worker->accounts, i)));
    set(object, "devices", devices);
    set(object, "per_session", number(worker->config.queues_per_session));
    set(object, "per_uid", number(worker->config.queues_per_uid));
    return object;
}

static json_t *status_document(struct worker *worker)
{
    json_t *document = header(worker, "status");
    const struct registry *registry = &worker->registry;
    char mps_path[512];
    set(document, "backend", json_string(backend_name(node_backend(worker->node))));
    set(document, "mps", json_boolean(mps_find(mps_path, sizeof(mps_path))));
    set(document, "peer_watch", json_string(peer_watch_name(worker->peer_watch)));
    set(document, "draining", json_boolean(worker->state != WORKER_SERVING));
    if (worker->fabric)
        set(document, "fabric_complete", json_boolean(fabric_complete(worker->fabric)));
    set(document, "generation", number(worker->start.generation));
    set(document, "hangs", number(worker->start.n_hangs));
    set(document, "last_exit", json_string(worker->start.last_exit));
    set(document, "supervisor_pid", json_integer(worker->start.supervisor_pid));
    set(document, "sockets",
        json_pack("{s:s s:s}", "rank", worker->config.socket, "control", worker->config.control_socket));
    set(document, "config_file", json_string(worker->config.file));
    set(document, "sessions", number(registry_count(registry, REGISTRY_SESSION)));
    set(document, "groups", number(registry_count(registry, REGISTRY_GROUP)));
    set(document, "buffers", number(registry_count(registry, REGISTRY_BUFFER)));
    set(document, "plans", number(registry_count(registry, REGISTRY_PLAN)));
    set(document, "launches_in_flight", number(launches_waiting(worker)));
    set(document, "n_devices", number(node_n_devices(worker->node)));
    set(document, "queues", queues_document(worker));
    set(document, "config", config_document(&worker->config));
    set(document, "limits_hit", stats_limits_document(worker));
    return document;
}

/* ---- clients, groups, plans, devices ---- */

static uint64_t in_flight(const struct session *session)
{
    uint64_t n = 0;
    list_each(node, after, &session->plans)
    {
        const struct rank_plan *plan = list_owner(node, struct rank_plan, in_session);
        n += plan->n_queued + plan->n_flights;
    }
    return n;
}

static json_t *client_document(const struct session *session, uint64_t now_ns)
{
    json_t *client = json_object();
    const uint64_t *used = session->quota.used;
    set(client, "session_id", number(session->id));
    set(client, "name", json_string(session->name));
    set(client, "kind", json_string(session->kind == SESSION_RANK ? "rank" : "control"));
    set(client, "state", json_string(session_state_name(session->state)));
    set(client, "pid", json_integer(session->peer.pid));
    if (session->kind == SESSION_RANK)
        set(client, "watched", json_boolean(session->peer_fd >= 0));
    set(client, "uid", json_integer(session->peer.uid));
    set(client, "connected_ms", number((now_ns - session->opened_ns) / CLOCK_NS_PER_MS));
    set(client, "idle_ms", number((now_ns - session->active_ns) / CLOCK_NS_PER_MS));
    set(client, "requests", number(session->n_requests));
    set(client, "groups", number(used[QUOTA_GROUPS]));
    set(client, "queues", number(used[QUOTA_QUEUES]));
    set(client, "buffers", number(used[QUOTA_BUFFERS]));
    set(client, "plans", number(used[QUOTA_PLANS]));
    set(client, "heap_bytes", number(used[QUOTA_HEAP_BYTES]));
    set(client, "imported_bytes", number(used[QUOTA_IMPORTED_BYTES]));
    set(client, "saved_bytes", number(used[QUOTA_SAVED_BYTES]));
    set(client, "in_flight", number(in_flight(session)));
    set(client, "output_bytes", number(session->output_bytes));
    return client;
}

static json_t *clients_document(struct worker *worker)
{
    json_t *document = header(worker, "clients"), *sessions = json_array();
    const uint64_t now_ns = clock_ns();
    list_each(node, after, &worker->sessions)(void)
        json_array_append_new(sessions, client_document(list_owner(node, struct session, in_worker), now_ns));
    set(document, "sessions", sessions);
    return document;
}

static json_t *rank_document(const struct group *group, uint32_t rank)
{
    json_t *object = json_object();
    struct member *member = group->members[rank];
    set(object, "rank", number(rank));
    set(object, "present", json_boolean(member != NULL));
    uint32_t node;
    if (group->span && group_span_node(group, rank, &node))
        set(object, "node", number(node));
    if (!member)
        return object;
    const int missing = group->gather.n_arrived && !(group->gather.arrived >> rank & 1);
    set(object, "session_id", number(member->session->id));
    set(object, "pid", json_integer(member->session->peer.pid));
    set(object, "device_idx", number(member->device_idx));
    set(object, "queued", number(member->queue.count));
    set(object, "waiting_for", json_boolean(missing));
    set(object, "heap_bytes", number(group->team ? team_heap_bytes(group->team, rank) : 0));
    return object;
}

static void set_agreement(json_t *object, const struct group *group)
{
    const struct message_group_config *config = &group->config;
    set(object, "dtype", json_string(dtype_name(config->dtype)));
    set(object, "overflow", json_string(config->overflow == EPD_OVERFLOW_DROP ? "drop" : "error"));
    set(object, "n_experts", number(config->n_experts));
    set(object, "top_k", number(config->top_k));
    set(object, "hidden", number(config->hidden));
    set(object, "ffn", number(config->ffn));
    set(object, "max_tokens", number(config->max_tokens));
    set(object, "capacity_rows",
        json_integer(group->team ? team_capacity_rows(group->team) : config->capacity_rows));
    set(object, "alignment", number(config->alignment));
    set(object, "deadline_ms",
        number(config->deadline_ms ? config->deadline_ms : group->worker->config.stuck_ms));
}

/* Plans that [cuda] graphs could not make graphs of. */
static void set_unrecorded(json_t *object, const struct group *group)
{
    struct epd_error why = {.status = EPD_OK};
    const uint32_t n = group->team ? team_n_unrecorded(group->team, &why) : 0;
    set(object, "unrecorded_plans", number(n));
    set(object, "unrecorded_reason", json_string(n ? why.text : ""));
}

static json_t *group_document(const struct group *group)
{
    json_t *object = json_object(), *ranks = json_array();
    set(object, "group_id", number(group->id));
    set(object, "name", json_string(group->name));
    set(object, "uid", number(group->uid));
    set(object, "state", json_string(group_state_name(group)));
    set(object, "reason", json_string(group->state == GROUP_BROKEN ? group->lost.text : ""));
    set(object, "epoch", number(group->epoch));
    set(object, "world_size", number(group->world_size));
    set(object, "exchange", json_string(group->team && team_is_fused(group->team) ? "fused" : "staged"));
    set_unrecorded(object, group);
    set_agreement(object, group);
    set(object, "launches", number(group->n_launches));
    set(object, "failed", number(group->n_failed));
    set(object, "in_flight", number(group->n_flights));
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        (void)json_array_append_new(ranks, rank_document(group, rank));
    set(object, "ranks", ranks);
    return object;
}

static json_t *groups_document(struct worker *worker)
{
    json_t *document = header(worker, "groups"), *groups = json_array();
    list_each(node, after, &worker->groups)(void)
        json_array_append_new(groups, group_document(list_owner(node, struct group, in_worker)));
    set(document, "groups", groups);
    return document;
}

static json_t *plan_document(const struct rank_plan *plan)
{
    json_t *object = json_object();
    char hash[24];
    (void)snprintf(hash, sizeof(hash), "%016" PRIx64, plan->plan ? plan_shape_hash(plan->plan) : (uint64_t)0);
    set(object, "plan_id", number(plan->id));
    set(object, "session_id", number(plan->session->id));
    set(object, "group_id", number(plan->group->id));
    set(object, "rank", number(plan->rank));
    set(object, "op", json_string(op_name(plan->op)));
    set(object, "plan_key", number(plan->joint ? plan->joint->key : 0));
    set(object, "state", json_string(rank_plan_state_name(plan->state)));
    set(object, "shape_hash", json_string(hash));
    set(object, "saved_bytes", number(plan->saved_bytes));
    set(object, "launches", number(plan->n_launches));
    set(object, "failed", number(plan->n_failed));
    set(object, "queued", number(plan->n_queued));
    set(object, "in_flight", number(plan->n_flights));
    set(object, "flag_idx", number(plan->flag_idx));
    return object;
}

static json_t *plans_document(struct worker *worker)
{
    json_t *document = header(worker, "plans"), *plans = json_array();
    list_each(node, after, &worker->sessions)
    {
        const struct session *session = list_owner(node, struct session, in_worker);
        list_each(plan_node, plan_after, &session->plans)(void)
            json_array_append_new(plans, plan_document(list_owner(plan_node, struct rank_plan, in_session)));
    }
    set(document, "plans", plans);
    return document;
}

static json_t *devices_document(struct worker *worker)
{
    json_t *document = header(worker, "devices");
    set(document, "backend", json_string(backend_name(node_backend(worker->node))));
    set(document, "devices", stats_devices_document(worker));
    return document;
}

static json_t *fabric_document(struct worker *worker)
{
    json_t *document = header(worker, "fabric");
    fabric_fill_document(worker->fabric, document);
    return document;
}

static json_t *whole_stats_document(struct session *session)
{
    json_t *document = header(session->worker, "stats");
    stats_fill_document(session, document);
    return document;
}

/* ---- verbs that do something ---- */

static enum epd_status evict(struct worker *worker, const struct message_control *control,
                             struct epd_error *error)
{
    struct session *session = registry_find(&worker->registry, REGISTRY_SESSION, control->session_id);
    if (!session || session->state == SESSION_CLOSING)
        return error_set(error, EPD_UNKNOWN_ID, "session %" PRIu64 " does not exist", control->session_id);
    session_close(session, CLOSE_EVICTED, control->reason[0] ? control->reason : NULL);
    return EPD_OK;
}

static enum epd_status make_document(struct session *session, const struct message_control *control,
                                     json_t **document, struct epd_error *error)
{
    struct worker *worker = session->worker;
    *document = NULL;
    switch (control->verb) {
    case CONTROL_STATUS:
        *document = status_document(worker);
        return EPD_OK;
    case CONTROL_STATS:
        *document = whole_stats_document(session);
        return EPD_OK;
    case CONTROL_CLIENTS:
        *document = clients_document(worker);
        return EPD_OK;
    case CONTROL_GROUPS:
        *document = groups_document(worker);
        return EPD_OK;
    case CONTROL_PLANS:
        *document = plans_document(worker);
        return EPD_OK;
    case CONTROL_DEVICES:
        *document = devices_document(worker);
        return EPD_OK;
    case CONTROL_FABRIC:
        *document = fabric_document(worker);
        return EPD_OK;
    default:
        return error_set(error, EPD_UNSUPPORTED, "control verb %d is not known here", (int)control->verb);
    }
}

static void answer_document(struct session *session, uint64_t request_id,
                            const struct message_control *control)
{
    struct epd_error error = {0};
    json_t *json = NULL;
    int fd = -1;
    uint64_t bytes = 0;
    enum epd_status status = make_document(session, control, &json, &error);
    if (status == EPD_OK)
        status = document_seal(json, &fd, &bytes, &error);
    if (status != EPD_OK) {
        session_reply_error(session, request_id, &error);
        return;
    }
    struct message reply = {
        .kind = MESSAGE_REPLY_DOCUMENT, .request_id = request_id, .reply_document = {.bytes = bytes}};
    session_send(session, &reply, fd);
    (void)close(fd);
}

void control_answer(struct session *session, const struct message *message)
{
    static const struct message_control stats = {.verb = CONTROL_STATS};
    const struct message_control *control = message->kind == MESSAGE_CONTROL ? &message->control : &stats;
    struct worker *worker = session->worker;
    struct epd_error error = {0};
    if (control->verb == CONTROL_DUMP) {
        dump_answer(session, message->request_id, header(worker, "dump"));
        return;
    }
    if (control->verb != CONTROL_DRAIN && control->verb != CONTROL_EVICT) {
        answer_document(session, message->request_id, control);
        return;
    }
    if (control->verb == CONTROL_DRAIN)
        worker_drain(worker);
    else if (evict(worker, control, &error) != EPD_OK) {
        session_reply_error(session, message->request_id, &error);
        return;
    }
    session_reply_ok(session, message->request_id);
}
