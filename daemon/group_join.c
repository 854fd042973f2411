/* Joins of ranks: which group is meant, whether they agree, and what becomes of the others when one is refused. */
#include <string.h>

#include "daemon/clock.h"
#include "daemon/group.h"
#include "daemon/group_fields.h"
#include "daemon/group_span.h"
#include "daemon/member.h"
#include "daemon/session.h"

static enum epd_status compare(const struct group *group, const struct message_group_join *join,
                               struct epd_error *error)
{
    if (join->world_size != group->world_size)
        return error_set(error, EPD_GROUP_MISMATCH, "group %s world_size: rank %u says %u, rank %u says %u",
                         group->name, join->rank, join->world_size, group->first_joiner, group->world_size);
    int64_t given[GROUP_N_FIELDS], want[GROUP_N_FIELDS];
    group_field_values(&join->config, given);
    group_field_values(&group->config, want);
    for (size_t i = 0; i < GROUP_N_FIELDS; i++) {
        char given_text[24], want_text[24];
        if (given[i] == want[i])
            continue;
        group_field_format(i, given[i], given_text, sizeof(given_text));
        group_field_format(i, want[i], want_text, sizeof(want_text));
        return error_set(error, EPD_GROUP_MISMATCH, "group %s %s: rank %u says %s, rank %u says %s",
                         group->name, group_field_name(i), join->rank, given_text, group->first_joiner,
                         want_text);
    }
    return group_span_compare(group, join, error);
}

static struct group *find_by_name(const struct worker *worker, uint32_t uid, const char *name)
{
    list_each(node, after, &worker->groups)
    {
        struct group *group = list_owner(node, struct group, in_worker);
        if (group->state != GROUP_BROKEN && group->uid == uid && strcmp(group->name, name) == 0)
            return group;
    }
    return NULL;
}

/* A rank that comes back is often accepted before the loop has heard that its old connection is gone. */
static int drop_hung_up(struct group *group, const struct session *asking)
{
    int n_dropped = 0;
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct session *session = group->members[rank] ? group->members[rank]->session : NULL;
        if (!session || session == asking || !session_hung_up(session))
            continue;
        session_close(session, CLOSE_CLIENT, NULL);
        n_dropped++;
    }
    return n_dropped;
}

static enum epd_status check_place(const struct group *group, const struct session *session,
                                   const struct message_group_join *join, struct epd_error *error)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->session == session)
            return error_set(error, EPD_IN_USE, "group %s: this session is rank %u of it already",
                             group->name, rank);
    if (join->rank >= group->world_size || group->members[join->rank])
        return error_set(error, EPD_IN_USE, "group %s rank %u: taken by another session", group->name,
                         join->rank);
    if (group->state == GROUP_OPEN)
        return error_set(error, EPD_IN_USE, "group %s: complete with %u ranks", group->name,
                         group->world_size);
    return EPD_OK;
}

static enum epd_status check_request(const struct message_group_join *join, struct epd_error *error)
{
    if (!join->world_size || join->world_size > EPD_MAX_WORLD_SIZE)
        return error_set(error, EPD_INVALID_ARGUMENT, "group world_size: %u, want 1 to %d", join->world_size,
                         EPD_MAX_WORLD_SIZE);
    if (join->rank >= join->world_size)
        return error_set(error, EPD_INVALID_ARGUMENT, "group rank: %u, want less than world_size %u",
                         join->rank, join->world_size);
    if (!join->name[0])
        return error_set(error, EPD_INVALID_ARGUMENT, "group name: empty");
    for (const char *at = join->name; *at; at++)
        if (*at < ' ' || *at > '~')
            return error_set(error, EPD_INVALID_ARGUMENT, "group name: byte 0x%02x, want printable ASCII",
                             (unsigned)(unsigned char)*at);
    return EPD_OK;
}

static enum epd_status bind_device(const struct worker *worker, const struct message_group_join *join,
                                   uint32_t *device_idx, struct epd_error *error)
{
    if (join->has_device)
        return node_find_device(worker->node, join->device_uuid, device_idx, error);
    const uint32_t n_nodes = join->config.n_nodes ? join->config.n_nodes : 1;
    *device_idx = join->rank % (join->world_size / n_nodes) % node_n_devices(worker->node);
    return EPD_OK;
}

/* The group of this name that the request may enter, or a new one. */
static enum epd_status find_or_create(struct session *session, const struct message_group_join *join,
                                      struct group **result, struct epd_error *error)
{
    struct worker *worker = session->worker;
    struct group *group = find_by_name(worker, session->peer.uid, join->name);
    if (group && drop_hung_up(group, session)) {
        session_end_closed(worker);
        if (session->state == SESSION_CLOSING) /* it was in that group and could not be told: gone too */
            return error_set(error, EPD_DISCONNECTED, "group %s: the session has ended", join->name);
        group = find_by_name(worker, session->peer.uid, join->name);
    }
    if (!group)
        return group_create(session, join, result, error);
    enum epd_status status = EPD_OK;
    if (group->state == GROUP_JOINING) {
        status = compare(group, join, error);
        if (status != EPD_OK) { /* nobody can tell who is right: all learn of it now */
            group_fail_join(group, error);
            return status;
        }
    }
    status = check_place(group, session, join, error);
    if (status == EPD_OK)
        *result = group;
    return status;
}

/* 1 if the request is one of those that the group waits for. */
static int is_awaited(const struct group *group, const struct session *session,
                      const struct message_group_join *join)
{
    struct epd_error ignored;
    return group->state == GROUP_JOINING && compare(group, join, &ignored) == EPD_OK &&
           check_place(group, session, join, &ignored) == EPD_OK;
}

void group_refuse_rank(struct session *session, const struct message_group_join *join,
                       const struct epd_error *error)
{
    struct worker *worker = session->worker;
    struct epd_error why;
    /* No group has such a rank, and what nodes do not read from each other ends their connection. */
    if (check_request(join, &why) != EPD_OK)
        return;
    struct group *group = find_by_name(worker, session->peer.uid, join->name);
    (void)error_set(&why, error->status, "group %s: rank %u was refused: %s", join->name, join->rank,
                    error->text);
    if (group && is_awaited(group, session, join))
        group_fail_join(group, &why);
    group_span_refuse_rank(session, join, error);
}

static enum epd_status join_group(struct session *session, uint64_t request_id,
                                  const struct message_group_join *join, struct epd_error *error)
{
    struct worker *worker = session->worker;
    if (worker->state != WORKER_SERVING)
        return error_set(error, EPD_DRAINING, "group %.64s: the daemon is draining, no new groups",
                         join->name);
    enum epd_status status = check_request(join, error);
    if (status == EPD_OK)
        status = group_span_check(worker, join, error);
    if (status != EPD_OK)
        return status;
    uint32_t device_idx = 0;
    status = bind_device(worker, join, &device_idx, error);
    if (status != EPD_OK)
        return status;
    struct group *group = NULL;
    status = find_or_create(session, join, &group, error);
    if (status != EPD_OK)
        return status;
    struct member *member = NULL;
    group_hold(group);
    status = member_create(group, session, join->rank, device_idx, request_id, &member, error);
    if (status == EPD_OK && group->n_members == group_n_ranks(group))
        group_begin(group);
    else if (status == EPD_OK)
        group_arm(group, group->created_ns + clock_ms_to_ns(worker->config.join_ms));
    if (group->state == GROUP_JOINING && !group->n_members)
        group->state = GROUP_BROKEN;
    group_release(group);
    return status;
}

/* What only this rank can do something about. The rest is no news to the others, or has been told to all of them. */
static int is_own_trouble(enum epd_status status)
{
    return status != EPD_OK && status != EPD_IN_USE && status != EPD_GROUP_MISMATCH &&
           status != EPD_DRAINING && status != EPD_DISCONNECTED;
}

enum epd_status group_join(struct session *session, uint64_t request_id,
                           const struct message_group_join *join, struct epd_error *error)
{
    const enum epd_status status = join_group(session, request_id, join, error);
    if (is_own_trouble(status))
        group_refuse_rank(session, join, error);
    return status;
}
