/* A client made of datagrams: says exactly what a test wants said, to a real daemon. One thread may drive
 * many of them, so that a test decides in which order ranks speak. Everything fails the running test when it
 * does not work. */
#ifndef EPD_TESTS_UNIT_DAEMON_RAW_CLIENT_H
#define EPD_TESTS_UNIT_DAEMON_RAW_CLIENT_H

#include "proto/arena.h"
#include "proto/codec.h"
#include "proto/page.h"

#define RAW_DEADLINE_MS 5000

struct raw_client {
    int fd;            /* owned, -1 when closed */
    struct page *page; /* owned mapping, NULL before Hello */
    uint64_t session_id, last_request_id;
    uint64_t epoch;
    uint8_t boot_id[EPD_BOOT_ID_BYTES];
    struct arena arena;
    struct message message; /* the last one received */
    int message_fd;         /* that came with it; owned, -1 if none */
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    enum codec_side side;
};

/* Connects; waits up to the deadline for the daemon to be there. */
void raw_connect(struct raw_client *client, const char *path);
/* Connects, says Hello and maps the page. */
void raw_open(struct raw_client *client, const char *path);
void raw_close(struct raw_client *client);

/* Sends with the next request id (0 for a launch), which it returns. */
uint64_t raw_send(struct raw_client *client, struct message message, int fd);
void raw_send_bytes(struct raw_client *client, const void *bytes, size_t n, int fd);
/* The next message, which must be of this kind. */
const struct message *raw_expect(struct raw_client *client, enum message_kind kind);
/* The next message must be REPLY_ERROR with the status, and its text must contain `part`. */
void raw_expect_error(struct raw_client *client, enum epd_status status, const char *part);
/* The next message must be CLOSED with the status, then the connection must end. */
void raw_expect_closed(struct raw_client *client, enum epd_status status, const char *part);
/* Nothing comes within this time. */
void raw_expect_silence(struct raw_client *client, int ms);

/* A group of barriers: everything small. */
struct message raw_join(const char *name, uint32_t world_size, uint32_t rank);
/* Joins all clients [n] as ranks of a group; returns its id. */
uint64_t raw_join_all(struct raw_client *const *clients, uint32_t n, const char *name);

struct raw_plan {
    uint64_t plan_id, shape_hash;
    uint32_t flag_idx, plan_key;
};
struct message raw_barrier(uint64_t group_id);
/* Reads REPLY_PLAN. */
struct raw_plan raw_take_plan(struct raw_client *client);
/* A barrier plan on every client. */
void raw_barrier_all(struct raw_client *const *clients, uint32_t n, uint64_t group_id,
                     struct raw_plan *plans);
/* ready = 1 and the LAUNCH datagram. */
void raw_launch(struct raw_client *client, const struct raw_plan *plan, uint64_t seq);
/* Waits for done; the status of the step: EPD_OK, or that of its entry in the page, whose text must contain
 * `part`. */
enum epd_status raw_done(struct raw_client *client, const struct raw_plan *plan, const char *part);

/* One request on the control socket; the document, zero-terminated, to be freed. */
char *raw_control(const char *path, enum control_verb verb);

#endif
