/* A client without the library: raw datagrams and fds on one of the daemon's sockets, for tests that break
 * the rules or end in the middle of a request. Owned by the test, one thread. What the daemon sends is
 * decoded and so checked; a datagram of the daemon that does not decode ends the test program. */
#ifndef EPD_TESTS_FAULT_WIRE_H
#define EPD_TESTS_FAULT_WIRE_H

#include <stddef.h>

#include "proto/arena.h"
#include "proto/message.h"
#include "proto/page.h"

/* Far beyond anything a loaded machine needs: a wait that takes this long is a hang. */
#define WIRE_DEADLINE_MS 30000

struct wire {
    int socket;          /* -1: closed */
    struct page *page;   /* after wire_hello */
    uint64_t request_id; /* of the newest request */
    uint64_t last_seq;   /* of the newest launch */
    struct arena arena;
    struct message reply;           /* newest message received */
    int reply_fd;                   /* owned, -1: none; the next receive closes it */
    enum epd_status closed;         /* what CLOSED said; EPD_OK: it did not come */
    char why[EPD_ERROR_TEXT_BYTES]; /* text of the newest ERROR or CLOSED */
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
};

enum wire_event {
    WIRE_MESSAGE, /* in reply, reply_fd */
    WIRE_NOTHING, /* none within the deadline */
    WIRE_ENDED,   /* the daemon hung up; `closed` says why if it said so */
};

/* 0, or the errno of connect. */
int wire_connect(struct wire *wire, const char *path);
/* Connects and says Hello; ends the test program if that does not work. */
void wire_open(struct wire *wire, const char *path);
void wire_close(struct wire *wire);

/* One datagram with fds; 0, or the errno of sendmsg. */
int wire_send_bytes(struct wire *wire, const void *datagram, size_t bytes, const int *fds, unsigned n_fds);
/* Encodes with a new request id (launches: 0) and sends. 0, or the errno of sendmsg. */
int wire_send(struct wire *wire, struct message *message, int fd);
enum wire_event wire_receive(struct wire *wire, int deadline_ms);
/* Reads until the daemon hangs up; returns what CLOSED said, EPD_DISCONNECTED without one, EPD_TIMEOUT if it
 * does not hang up. */
enum epd_status wire_wait_end(struct wire *wire);

/* Sends and waits for the reply: EPD_OK (in reply), the status of an ERROR, of a CLOSED, or EPD_DISCONNECTED.
 */
enum epd_status wire_call(struct wire *wire, struct message *message, int fd);
/* Waits for the reply of the newest request. */
enum epd_status wire_answer(struct wire *wire);

enum epd_status wire_hello(struct wire *wire);
/* The message of a join: a small group of that size, f32, 4 experts of each rank. */
struct message wire_join_message(const char *group, uint32_t world_size, uint32_t rank);
struct message wire_alloc_message(uint64_t group_id, uint64_t bytes);
struct message wire_register_message(uint64_t group_id, uint64_t offset, uint64_t bytes);
struct message wire_id_message(enum message_kind kind, uint64_t id);
struct message wire_barrier_message(uint64_t group_id);

/* Group of its own (world size 1); ends the test program if that does not work. Returns its id. */
uint64_t wire_join_alone(struct wire *wire, const char *group);

/* Launches a plan answered by `plan`. ready: sets the plan's flag first, as a decent client does. */
int wire_launch(struct wire *wire, const struct message_reply_plan *plan, int ready);
/* Waits for the done flag and clears it. EPD_OK, or the status that the page reports. */
enum epd_status wire_done(struct wire *wire, const struct message_reply_plan *plan);

#endif
