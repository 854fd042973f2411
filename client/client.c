#include "client/client.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/group.h"
#include "client/options.h"
#include "client/plan.h"

/* How long epd_open and epd_reconnect wait for the daemon unless told otherwise. */
#define CLIENT_OPEN_TIMEOUT_MS 10000

/* How long a message may wait for room in the socket of a daemon that does not read. Then the call that sends
 * it ends with EPD_TIMEOUT; nothing was sent. */
#define CLIENT_SEND_TIMEOUT_MS 20000

/* After a loss: how often streams are looked at that have to take flags, and how often once none has taken one
 * for RELEASE_IDLE_NS: a stream may have work of its own between two launches, or launches that were armed and are
 * never replayed. A client that closes waits no longer than that. */
#define RELEASE_PAUSE_NS      20000
#define RELEASE_SLOW_PAUSE_NS 1000000
#define RELEASE_IDLE_NS       1000000000

/* Longest statistics document that is taken from the daemon. */
#define CLIENT_MAX_DOCUMENT_BYTES (64u << 20)

enum epd_status client_enter(const struct epd_client *client, const char *what, struct epd_error **error)
{
    *error = error_begin();
    if (!client)
        return error_set(*error, EPD_INVALID_ARGUMENT, "%s: NULL", what);
    if (!stamp_is_mine(&client->stamp))
        return error_set(*error, EPD_INVALID_ARGUMENT,
                         "%s: made before fork() by the parent of process %d; open a client of its own here",
                         what, (int)getpid());
    return EPD_OK;
}

struct connection *client_connection(const struct epd_client *client)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)&client->lock;

    pthread_mutex_lock(lock);
    struct connection *connection = client->connection;
    connection_retain(connection);
    pthread_mutex_unlock(lock);
    return connection;
}

/* Returns how many launches are left. */
static uint64_t client_release(struct epd_client *client, struct connection *connection)
{
    struct epd_group *group;
    struct epd_plan *plan;
    uint64_t n_left = 0;

    pthread_mutex_lock(&client->lock);
    TAILQ_FOREACH (group, &client->groups, link) {
        if (group->connection != connection)
            continue;
        TAILQ_FOREACH (plan, &group->plans, link) {
            n_left += group->ops->release(plan);
        }
    }
    pthread_mutex_unlock(&client->lock);
    return n_left;
}

/* Watcher thread: no wait of this connection's plans may outlive it. Streams take their flags one after the
 * other, until none is left or the client has left this connection. */
static void client_lost(void *arg, struct connection *connection)
{
    struct epd_client *client = arg;
    uint64_t n_left = client_release(client, connection), n_before = n_left;
    /* By the clock: a nap takes as long as the machine likes. */
    uint64_t idle_since_ns = deadline_now_ns();

    while (n_left > 0) {
        int idle = deadline_now_ns() - idle_since_ns > RELEASE_IDLE_NS;
        if (idle && connection_stopping(connection))
            return;
        nanosleep(&(struct timespec){.tv_nsec = idle ? RELEASE_SLOW_PAUSE_NS : RELEASE_PAUSE_NS}, NULL);
        n_left = client_release(client, connection);
        if (n_left != n_before)
            idle_since_ns = deadline_now_ns();
        n_before = n_left;
    }
}

static enum epd_status client_connect(struct epd_client *client, uint32_t timeout_ms,
                                      struct connection **connection, struct epd_error *error)
{
    const struct connection_config config = {
        .path = client->socket_path,
        .client_name = client->name,
        .deadline_ns = deadline_after_ms(timeout_ms ? timeout_ms : CLIENT_OPEN_TIMEOUT_MS),
        .send_timeout_ms = CLIENT_SEND_TIMEOUT_MS,
        .lost = client_lost,
        .arg = client,
    };

    return connection_open(&config, connection, error);
}

/* The name given, or the program's with what the protocol refuses in a name replaced. */
static enum epd_status client_set_name(struct epd_client *client, const char *given, struct epd_error *error)
{
    const char *name = given ? given : program_invocation_short_name;
    size_t bytes = strlen(name);

    if (given && bytes >= sizeof client->name)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_open_options client_name: %zu bytes, at most %zu",
                         bytes, sizeof client->name - 1);
    if (bytes >= sizeof client->name)
        bytes = sizeof client->name - 1;
    memcpy(client->name, name, bytes);
    client->name[bytes] = 0;
    for (size_t i = 0; !given && i < bytes; i++)
        if ((unsigned char)client->name[i] < 0x20 || client->name[i] == 0x7f)
            client->name[i] = '?';
    return EPD_OK;
}

static void client_free(struct epd_client *client)
{
    stamp_fini(&client->stamp);
    pthread_mutex_destroy(&client->lock);
    pthread_mutex_destroy(&client->reopen_lock);
    free(client);
}

/* NULL, and *error set, if there is no memory. */
static struct epd_client *client_create(struct epd_error *error)
{
    struct epd_client *client = calloc(1, sizeof *client);

    if (!client) {
        error_set(error, EPD_NO_MEMORY, "client: no memory for %zu bytes", sizeof *client);
        return NULL;
    }
    if (stamp_init(&client->stamp, error)) {
        free(client);
        return NULL;
    }
    pthread_mutex_init(&client->lock, NULL);
    pthread_mutex_init(&client->reopen_lock, NULL);
    TAILQ_INIT(&client->groups);
    return client;
}

enum epd_status epd_open(const struct epd_open_options *options, struct epd_client **opened)
{
    struct epd_error *error = error_begin();
    struct epd_open_options known = {.size = sizeof known};

    if (!opened)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_open: nowhere to put the client");
    if (options && options_read(&known, sizeof known, options, "epd_open_options", error))
        return error->status;
    struct epd_client *client = client_create(error);
    if (!client)
        return error->status;
    if (dial_path(known.socket_path, client->socket_path, error) ||
        client_set_name(client, known.client_name, error) ||
        client_connect(client, known.timeout_ms, &client->connection, error)) {
        client_free(client);
        return error->status;
    }
    *opened = client;
    return EPD_OK;
}

void epd_close(struct epd_client *client)
{
    struct epd_error *error;
    struct epd_group *group;

    /* In a forked child everything belongs to the parent, the socket too: nothing is touched. */
    if (!client || client_enter(client, "client", &error))
        return;
    TAILQ_FOREACH (group, &client->groups, link) {
        group_say_goodbye(group);
    }
    connection_stop(client->connection);
    TAILQ_FOREACH (group, &client->groups, link) {
        connection_stop(group->connection); /* of an earlier worker */
    }
    while ((group = TAILQ_FIRST(&client->groups)))
        group_free(group);
    connection_release(client->connection);
    client_free(client);
}

enum epd_status epd_reconnect(struct epd_client *client, uint32_t timeout_ms)
{
    struct epd_error *error;
    struct connection *fresh;

    if (client_enter(client, "client", &error))
        return error->status;
    pthread_mutex_lock(&client->reopen_lock);
    enum epd_status status = EPD_OK;
    if (connection_check(client->connection, error)) {
        status = client_connect(client, timeout_ms, &fresh, error);
        if (status == EPD_OK) {
            error = error_begin();
            pthread_mutex_lock(&client->lock);
            struct connection *lost = client->connection;
            client->connection = fresh;
            pthread_mutex_unlock(&client->lock);
            connection_release(lost);
        }
    }
    pthread_mutex_unlock(&client->reopen_lock);
    return status;
}

static void info_of_hello(struct epd_client_info *info, const struct message_reply_hello *hello)
{
    _Static_assert(sizeof info->devices / sizeof info->devices[0] == EPD_MAX_DEVICES,
                   "every device has a place");
    _Static_assert(sizeof info->devices[0].name == EPD_MAX_NAME_BYTES, "names fit");

    memcpy(info->daemon_version, hello->daemon_version, sizeof info->daemon_version);
    info->protocol_major = hello->major;
    info->protocol_minor = hello->minor;
    info->backend = hello->backend;
    info->session_id = hello->session_id;
    memcpy(info->boot_id, hello->boot_id, sizeof info->boot_id);
    info->epoch = hello->epoch;
    info->n_devices = hello->n_devices;
    for (uint32_t i = 0; i < hello->n_devices; i++) {
        memcpy(info->devices[i].uuid, hello->devices[i].uuid, sizeof info->devices[i].uuid);
        info->devices[i].device_idx = hello->devices[i].device_idx;
        memcpy(info->devices[i].name, hello->devices[i].name, sizeof info->devices[i].name);
        info->devices[i].memory_bytes = hello->devices[i].memory_bytes;
    }
}

enum epd_status epd_client_info(const struct epd_client *client, struct epd_client_info *given)
{
    struct epd_error *error;
    struct epd_client_info info = {.size = sizeof info};

    if (client_enter(client, "client", &error))
        return error->status;
    struct connection *connection = client_connection(client);
    info_of_hello(&info, connection_hello(connection));
    connection_release(connection);
    return options_write(given, &info, sizeof info, "epd_client_info", error);
}

/* The text of a document that came as a memfd. Read, not mapped: a file that is too short is an error here,
 * not a signal. */
static enum epd_status document_read(int fd, uint64_t bytes, char **text, struct epd_error *error)
{
    if (fd < 0)
        return error_set(error, EPD_PROTOCOL, "the daemon's statistics came without their fd");
    if (bytes > CLIENT_MAX_DOCUMENT_BYTES)
        return error_set(error, EPD_PROTOCOL, "the daemon's statistics: %llu bytes, at most %u",
                         (unsigned long long)bytes, CLIENT_MAX_DOCUMENT_BYTES);
    char *document = malloc((size_t)bytes + 1);
    if (!document)
        return error_set(error, EPD_NO_MEMORY, "statistics: no memory for %llu bytes",
                         (unsigned long long)bytes);
    size_t n_read = 0;
    while (n_read < bytes) {
        ssize_t n = pread(fd, document + n_read, (size_t)bytes - n_read, (off_t)n_read);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            free(document);
            return error_set(error, EPD_PROTOCOL, "the daemon's statistics end after %zu of %llu bytes",
                             n_read, (unsigned long long)bytes);
        }
        n_read += (size_t)n;
    }
    document[bytes] = 0;
    *text = document;
    return EPD_OK;
}

enum epd_status epd_stats(struct epd_client *client, char **json)
{
    struct epd_error *error;
    struct message request = {.kind = MESSAGE_STATS};
    struct inbox_item reply;

    if (client_enter(client, "client", &error))
        return error->status;
    if (!json)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_stats: nowhere to put the document");
    struct connection *connection = client_connection(client);
    enum epd_status status = connection_call(connection, &request, -1, MESSAGE_REPLY_DOCUMENT,
                                             CLIENT_REPLY_TIMEOUT_MS, &reply, error);
    if (status == EPD_OK) {
        status = document_read(reply.fd, reply.message.reply_document.bytes, json, error);
        if (reply.fd >= 0)
            close(reply.fd);
    }
    connection_release(connection);
    return status;
}

void epd_free(void *memory)
{
    free(memory);
}
