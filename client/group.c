#include "client/group.h"

#include <stdlib.h>
#include <string.h>

#include "client/buffer.h"
#include "client/options.h"
#include "client/plan.h"

enum epd_status group_enter(const struct epd_group *group, const char *what, struct epd_error **error)
{
    if (client_enter(group ? group->client : NULL, what, error))
        return (*error)->status;
    return connection_check(group->connection, *error);
}

struct connection *group_connection(const struct epd_group *group)
{
    return group->next ? group->next : group->connection;
}

enum epd_status group_call(struct epd_group *group, struct message *request, int fd, enum message_kind want,
                           uint32_t timeout_ms, struct inbox_item *reply, struct epd_error *error)
{
    return connection_call(group_connection(group), request, fd, want, timeout_ms, reply, error);
}

/* The join request, with the defaults filled in; its ranges are checked where it is encoded. */
static enum epd_status join_of_options(const struct epd_group_options *options,
                                       struct message_group_join *join, struct epd_error *error)
{
    if (!options->name)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_group_options name: NULL");
    if (strlen(options->name) >= sizeof join->name)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_group_options name: %zu bytes, at most %zu",
                         strlen(options->name), sizeof join->name - 1);
    memset(join, 0, sizeof *join);
    strcpy(join->name, options->name);
    join->world_size = options->world_size;
    join->rank = options->rank;
    join->has_device = options->device_uuid != NULL;
    if (options->device_uuid)
        memcpy(join->device_uuid, options->device_uuid, sizeof join->device_uuid);
    join->config = (struct message_group_config){
        .n_experts = options->n_experts,
        .top_k = options->top_k,
        .hidden = options->hidden,
        .ffn = options->ffn,
        .max_tokens = options->max_tokens,
        .capacity_rows = options->capacity_rows,
        .alignment = options->alignment ? options->alignment : 1,
        .dtype = options->dtype,
        .overflow = options->overflow ? options->overflow : EPD_OVERFLOW_ERROR,
        .deadline_ms = options->deadline_ms,
        .n_nodes = options->n_nodes,
    };
    return EPD_OK;
}

enum epd_status group_request(struct epd_group *group, struct epd_error *error)
{
    struct message request = {.kind = MESSAGE_GROUP_JOIN, .group_join = group->join};
    struct inbox_item reply;

    if (group_call(group, &request, -1, MESSAGE_REPLY_GROUP, CLIENT_COLLECTIVE_TIMEOUT_MS, &reply, error))
        return error->status;
    group->reply = reply.message.reply_group;
    return EPD_OK;
}

enum epd_status epd_group_join(struct epd_client *client, const struct epd_group_options *options,
                               struct epd_group **joined)
{
    struct epd_error *error;
    struct epd_group_options known;

    if (client_enter(client, "client", &error))
        return error->status;
    if (!joined)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_group_join: nowhere to put the group");
    if (options_read(&known, sizeof known, options, "epd_group_options", error))
        return error->status;
    struct epd_group *group = calloc(1, sizeof *group);
    if (!group)
        return error_set(error, EPD_NO_MEMORY, "group: no memory for %zu bytes", sizeof *group);
    group->client = client;
    group->connection = client_connection(client);
    TAILQ_INIT(&group->buffers);
    TAILQ_INIT(&group->plans);
    pthread_mutex_init(&group->launch_lock, NULL);
    if (join_of_options(&known, &group->join, error) ||
        stream_ops_for(connection_hello(group->connection)->backend, &group->ops, error) ||
        group_request(group, error)) {
        connection_release(group->connection);
        pthread_mutex_destroy(&group->launch_lock);
        free(group);
        return error->status;
    }
    pthread_mutex_lock(&client->lock);
    TAILQ_INSERT_TAIL(&client->groups, group, link);
    pthread_mutex_unlock(&client->lock);
    *joined = group;
    return EPD_OK;
}

void group_free(struct epd_group *group)
{
    struct epd_client *client = group->client;
    struct epd_plan *plan;
    struct epd_buffer *buffer;

    pthread_mutex_lock(&client->lock);
    TAILQ_REMOVE(&client->groups, group, link);
    pthread_mutex_unlock(&client->lock);
    while ((plan = TAILQ_FIRST(&group->plans))) {
        TAILQ_REMOVE(&group->plans, plan, link);
        plan_free(plan);
    }
    while ((buffer = TAILQ_FIRST(&group->buffers))) {
        TAILQ_REMOVE(&group->buffers, buffer, link);
        buffer_free(buffer);
    }
    connection_release(group->connection);
    pthread_mutex_destroy(&group->launch_lock);
    free(group);
}

void group_abandon(struct epd_group *group)
{
    struct message request = {.kind = MESSAGE_GROUP_LEAVE, .group_leave = {.id = group->reply.group_id}};
    struct inbox_item reply;
    struct epd_error ignored;

    /* A daemon that is gone, or does not know the group any more, has nothing left of it. */
    if (group_call(group, &request, -1, MESSAGE_REPLY_OK, CLIENT_REPLY_TIMEOUT_MS, &reply, &ignored))
        return;
}

void group_say_goodbye(struct epd_group *group)
{
    struct message request = {.kind = MESSAGE_GROUP_LEAVE, .group_leave = {.id = group->reply.group_id}};
    struct epd_error ignored;

    if (connection_check(group->connection, &ignored) == EPD_OK)
        connection_tell_last(group->connection, &request);
}

void epd_group_leave(struct epd_group *group)
{
    struct epd_error *error;

    if (!group || client_enter(group->client, "group", &error))
        return;
    group_abandon(group);
    group_free(group);
}

enum epd_status epd_group_info(const struct epd_group *group, struct epd_group_info *given)
{
    struct epd_error *error;

    if (group_enter(group, "group", &error))
        return error->status;
    struct epd_group_info info = {
        .size = sizeof info,
        .epoch = group->reply.epoch,
        .world_size = group->join.world_size,
        .rank = group->join.rank,
        .n_local_experts = group->reply.n_local_experts,
        .first_expert = group->reply.first_expert,
        .capacity_rows = group->reply.capacity_rows,
        .device_idx = group->reply.device_idx,
    };
    memcpy(info.device_uuid, group->reply.device_uuid, sizeof info.device_uuid);
    return options_write(given, &info, sizeof info, "epd_group_info", error);
}
