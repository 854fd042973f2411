/* struct epd_group: this rank's membership, and the list of what was made in it. Lists are guarded by
 * client->lock. */
#ifndef EPD_CLIENT_GROUP_H
#define EPD_CLIENT_GROUP_H

#include "client/client.h"

struct epd_group {
    struct epd_client *client;     /* borrowed: ends its groups before itself */
    struct connection *connection; /* the one it was joined over; one reference */
    /* while it is being recovered: the one its requests go to; borrowed; else NULL */
    struct connection *next;
    const struct stream_ops *ops;
    struct message_group_join join; /* as it was asked for */
    struct message_reply_group reply;
    uint64_t last_seq; /* of launches; guarded by the connection */
    /* Held while a launch is sent and put into its stream: streams have the launches in the order of the messages. One that
     * waited in front of an earlier one would wait for ever. */
    pthread_mutex_t launch_lock;
    TAILQ_HEAD(, epd_buffer) buffers;
    TAILQ_HEAD(, epd_plan) plans;
    TAILQ_ENTRY(epd_group) link;
};

/* Begins a public call on something made in a group, which must still have its connection. */
EPD_MUST_CHECK enum epd_status group_enter(const struct epd_group *group, const char *what,
                                           struct epd_error **error);
/* connection_call over the group's connection, or over the one it is being recovered to. */
EPD_MUST_CHECK enum epd_status group_call(struct epd_group *group, struct message *request, int fd,
                                          enum message_kind want, uint32_t timeout_ms,
                                          struct inbox_item *reply, struct epd_error *error);
struct connection *group_connection(const struct epd_group *group);
/* Asks the daemon for the rank, as group->join says, and takes its answer. */
EPD_MUST_CHECK enum epd_status group_request(struct epd_group *group, struct epd_error *error);
/* Gives the rank up; what the daemon says does not matter. */
void group_abandon(struct epd_group *group);
/* The same, if the connection is there, waiting neither for an answer nor for room: the connection ends next. */
void group_say_goodbye(struct epd_group *group);
/* Frees the group and what is left in it without telling the daemon: after the connection was stopped or the
 * group left. */
void group_free(struct epd_group *group);

#endif
