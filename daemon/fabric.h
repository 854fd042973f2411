/* The daemons of several nodes, joined: who is there, and the way of their messages. Node 0 listens and coordinates
 * (fabric_coordinator.h); the others connect to it, again and again, and talk to it alone. Loop thread.
 *
 * A node is there once both sides have shown the secret and it has said hello. The fabric is complete when all nodes
 * are there, and each time it becomes so it begins a new epoch. A node that has not been heard of for node_dead, or whose
 * connection ended, is lost: groups that span it end at once with an error that names it, and it may come back. What a
 * group needs is node 0 and its own nodes: it is joined and goes on whether or not the others are there. */
#ifndef EPD_DAEMON_FABRIC_H
#define EPD_DAEMON_FABRIC_H

#include <jansson.h>
#include <uv.h>

#include "daemon/fabric_config.h"
#include "daemon/fabric_link.h"
#include "daemon/list.h"

struct worker;
struct coordinator;

/* Connections that have not shown the secret yet. */
#define FABRIC_MAX_STRANGERS 16
/* How often links, deadlines and lost nodes are looked at. */
#define FABRIC_BEAT_MS 50
/* Waits between two tries to connect: from the first to the second of these, doubling. */
#define FABRIC_RETRY_FIRST_MS 50
#define FABRIC_RETRY_MAX_MS   2000

struct fabric_node {
    struct fabric_link *link; /* NULL: not connected to us */
    int present;              /* has said hello; of nodes that we do not talk to, as node 0 says */
    char version[EPD_MAX_NAME_BYTES], address[64];
    uint64_t since_ns; /* present, or lost */
    uint64_t rtt_ns;   /* of the last ping; 0: none yet */
    uint64_t pinged_ns;
    uint64_t n_losses;
    uint64_t sent_bytes, received_bytes; /* of the links that have ended */
    char last_error[EPD_ERROR_TEXT_BYTES];
};

/* Agreements about steps, as this node sees them. */
struct fabric_agreements {
    uint64_t n, sum_ns, max_ns; /* from the announcement of a step to its go */
    uint64_t n_ahead;           /* the go came while an earlier step of the group was on the lanes: hidden */
};

struct fabric {
    struct worker *worker; /* borrowed, outlives this */
    struct fabric_config config;
    struct fabric_link_owner owner;
    struct coordinator *coordinator; /* owned; node 0 only */
    struct fabric_node nodes[EPD_MAX_NODES];
    uint64_t epoch;
    int complete, was_complete;
    uv_tcp_t server; /* node 0 only */
    uv_timer_t beat;
    uv_async_t wake; /* messages of node 0 to itself */
    uv_getaddrinfo_t lookup;
    struct list to_self; /* of them */
    struct list gos;     /* struct fabric_go: steps to begin, in the order of the fabric */
    int looking_up, stopped;
    uint64_t retry_at_ns, retry_ms;
    struct fabric_link *strangers[FABRIC_MAX_STRANGERS];
    struct arena arena;
    struct fabric_agreements agreements;
    char last_error[EPD_ERROR_TEXT_BYTES];
    uint8_t encoded[FABRIC_MAX_MESSAGE_BYTES];
};

/* Loads the transport of the backend's groups (before any thread runs) and reads the secret. *fabric is NULL if the configuration
 * asks for none. EPD_INVALID_ARGUMENT, EPD_UNSUPPORTED: it can never work so. */
EPD_MUST_CHECK enum epd_status fabric_create(struct worker *worker, enum epd_backend_kind backend,
                                             struct fabric **fabric, struct epd_error *error);
/* Listens, or begins to connect. */
EPD_MUST_CHECK enum epd_status fabric_start(struct fabric *fabric, struct epd_error *error);
/* Ends all links; the other nodes learn of it now. Idempotent; NULL is legal. */
void fabric_stop(struct fabric *fabric);
/* The loop has ended. */
void fabric_destroy(struct fabric *fabric);

/* To the coordinator; dropped, and EPD_PEER_LOST, while there is no way to it. */
EPD_MUST_CHECK enum epd_status fabric_ask(struct fabric *fabric, const struct fabric_message *message,
                                          struct epd_error *error);
/* The coordinator to a node (itself too); dropped if it is not there. */
void fabric_tell(struct fabric *fabric, uint32_t node, const struct fabric_message *message);
int fabric_complete(const struct fabric *fabric);
/* The control socket's document: see control.h. */
void fabric_fill_document(const struct fabric *fabric, json_t *document);

#endif
