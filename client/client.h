/* struct epd_client: one process' standing with the daemon. It owns the connection and the table of what was
 * made over it: groups in order of creation, each with its buffers and plans in order of creation and with
 * the options they were made with, which is what making them again after a restart needs.
 *
 * Threads: any. client->lock guards the connection pointer and the lists, and is held for a few instructions,
 * never over a round trip: the watcher thread takes it when the connection is lost. */
#ifndef EPD_CLIENT_CLIENT_H
#define EPD_CLIENT_CLIENT_H

#include <pthread.h>
#include <sys/queue.h>

#include "client/connection.h"
#include "client/error.h"
#include "client/public.h"
#include "client/stamp.h"
#include "client/stream.h"

/* How long a call waits for an answer that needs this session only. Passing it means that the daemon hangs.
 */
#define CLIENT_REPLY_TIMEOUT_MS 120000
/* The same for an answer that needs every rank. The daemon's own join and plan deadlines, which are
 * configurable and name the missing ranks, come first. */
#define CLIENT_COLLECTIVE_TIMEOUT_MS 3600000

struct epd_client {
    struct stamp stamp;
    char socket_path[DIAL_PATH_BYTES];
    char name[EPD_MAX_NAME_BYTES];
    pthread_mutex_t reopen_lock; /* one epd_reconnect at a time; held over its round trips */
    pthread_mutex_t lock;
    struct connection *connection; /* the newest; one reference */
    TAILQ_HEAD(group_list, epd_group) groups;
};

/* Begins a public call: clears the thread's error and hands it out. EPD_INVALID_ARGUMENT if client is NULL
 * ("what: NULL") or was made by the process that this one was forked from. */
EPD_MUST_CHECK enum epd_status client_enter(const struct epd_client *client, const char *what,
                                            struct epd_error **error);

/* The newest connection with a reference that the caller releases. */
struct connection *client_connection(const struct epd_client *client);

#endif
