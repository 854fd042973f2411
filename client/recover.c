/* After the loss of a connection: everything in the client's table again, over the next one. A group goes
 * over in one step at the end; until then its objects answer what the old connection was lost by, so that a
 * failure halfway leaves nothing half-usable. */
#include <unistd.h>

#include "client/buffer.h"
#include "client/plan.h"

static enum epd_status restore_group(struct epd_group *group, struct connection *next,
                                     struct epd_error *error)
{
    struct epd_buffer *buffer;

    group->next = next;
    if (group_request(group, error)) {
        group->next = NULL; /* nothing to give up */
        return error->status;
    }
    TAILQ_FOREACH (buffer, &group->buffers, link) {
        if (buffer_restore(buffer, error))
            return error->status;
    }
    return EPD_OK;
}

static enum epd_status restore_plans(struct epd_group *group, struct epd_error *error)
{
    struct epd_plan *plan;

    TAILQ_FOREACH (plan, &group->plans, link) {
        if (plan_restore(plan, error))
            return error->status;
    }
    return EPD_OK;
}

/* All buffers before any plan: a plan may be bound to a buffer of another group. */
static enum epd_status restore_all(struct epd_client *client, struct connection *next,
                                   struct epd_error *error)
{
    struct epd_group *group;

    TAILQ_FOREACH (group, &client->groups, link) {
        if (group->connection != next && restore_group(group, next, error))
            return error->status;
    }
    TAILQ_FOREACH (group, &client->groups, link) {
        if (group->next && restore_plans(group, error))
            return error->status;
    }
    return EPD_OK;
}

static void abandon_all(struct epd_client *client)
{
    struct epd_group *group;

    TAILQ_FOREACH (group, &client->groups, link) {
        if (group->next)
            group_abandon(group);
        group->next = NULL;
    }
}

static void go_over(struct epd_group *group)
{
    struct connection *lost = group->connection;

    connection_retain(group->next);
    pthread_mutex_lock(&group->client->lock);
    group->connection = group->next;
    group->next = NULL;
    group->last_seq = 0;
    pthread_mutex_unlock(&group->client->lock);
    connection_release(lost);
}

static enum epd_status check_idle(const struct epd_client *client, struct epd_error *error)
{
    struct epd_group *group;
    struct epd_plan *plan;

    TAILQ_FOREACH (group, &client->groups, link) {
        TAILQ_FOREACH (plan, &group->plans, link) {
            if (connection_check(group->connection, error) && atomic_load(&plan->state) != PLAN_IDLE)
                return error_set(error, EPD_BUSY, "plan %llu: its last launch was not waited for",
                                 (unsigned long long)plan->reply.plan_id);
        }
    }
    error->status = EPD_OK;
    return EPD_OK;
}

/* A rank whose last launch ended well learns from another that the daemon's worker is gone, perhaps before its own
 * watcher does. One round trip settles it: without it this rank would find nothing to recover, and the others
 * would wait for it in the join. */
static void ask_whether_lost(struct epd_client *client)
{
    struct connection *connection = client_connection(client);
    struct message request = {.kind = MESSAGE_STATS};
    struct inbox_item reply;
    struct epd_error ignored;

    if (connection_call(connection, &request, -1, MESSAGE_REPLY_DOCUMENT, CLIENT_REPLY_TIMEOUT_MS, &reply,
                        &ignored) == EPD_OK &&
        reply.fd >= 0)
        close(reply.fd);
    connection_release(connection);
}

enum epd_status epd_recover(struct epd_client *client, uint32_t timeout_ms)
{
    struct epd_error *error;
    struct epd_group *group;

    if (client_enter(client, "client", &error))
        return error->status;
    ask_whether_lost(client);
    if (check_idle(client, error))
        return error->status;
    enum epd_status status = epd_reconnect(client, timeout_ms);
    if (status)
        return status;
    struct connection *next = client_connection(client);
    status = restore_all(client, next, error);
    if (status) {
        struct epd_error kept = *error;
        abandon_all(client);
        *error = kept;
    } else {
        TAILQ_FOREACH (group, &client->groups, link) {
            if (group->next)
                go_over(group);
        }
    }
    connection_release(next);
    return status;
}
