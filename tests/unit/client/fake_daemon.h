/* A daemon that a test plays itself: a listening socket and a thread that follows the test's script, speaking
 * the real codec. The script answers what it wants to and when. Owned by the test; fake_stop joins the
 * script. */
#ifndef EPD_TESTS_UNIT_CLIENT_FAKE_DAEMON_H
#define EPD_TESTS_UNIT_CLIENT_FAKE_DAEMON_H

#include <pthread.h>

#include "client/public.h"
#include "proto/arena.h"
#include "proto/message.h"
#include "proto/page.h"

struct fake {
    char directory[64];
    char path[96];
    int listener; /* -1 once the daemon is "gone" */
    int socket;   /* of the session; -1 between sessions */
    struct page *page;
    struct arena arena;
    struct message last; /* what fake_expect received */
    int last_fd;
    uint64_t session_id, next_id;
    int n_goodbyes;
    uint8_t boot; /* first byte of the boot id */
    pthread_t thread;
    void (*script)(struct fake *fake);
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
};

/* Listens; no thread yet. */
void fake_open(struct fake *fake);
/* Runs the script in a thread. */
void fake_start(struct fake *fake, void (*script)(struct fake *fake));
/* Waits for the script, closes and removes everything. */
void fake_stop(struct fake *fake);

/* For scripts. They abort the test when the client does not do what is expected. */
void fake_accept(struct fake *fake);
/* Receives one message of the kind into fake->last and closes the fd of an earlier one. */
void fake_expect(struct fake *fake, enum message_kind kind);
/* 1 if the client hung up, after it has left its groups (counted in n_goodbyes); 0 if it sent something else. */
int fake_peer_closed(struct fake *fake);
void fake_send(struct fake *fake, const struct message *message, int fd);
/* Answer fake->last. */
void fake_answer_ok(struct fake *fake);
void fake_answer_error(struct fake *fake, enum epd_status status, const char *text);
void fake_answer_hello(struct fake *fake);
void fake_answer_group(struct fake *fake);
void fake_answer_buffer(struct fake *fake); /* alloc: with memory; register: without */
void fake_answer_plan(struct fake *fake, uint32_t flag_idx);
void fake_notice(struct fake *fake, enum epd_status status, const char *reason);
void fake_hang_up(struct fake *fake);
void fake_stop_listening(struct fake *fake);
/* What a lane does at the end of a launch: consumes ready, counts, sets done. */
void fake_complete(struct fake *fake, uint32_t flag_idx);
void fake_fail(struct fake *fake, uint32_t flag_idx, const struct page_entry *entry);

/* A whole opening: accept, hello, group. */
void fake_session(struct fake *fake);

/* For the client's side of tests. */
struct epd_client *open_client(const struct fake *fake);
struct epd_group *join_group(struct epd_client *client);
/* A barrier plan: no tensors. */
struct epd_plan *create_barrier(struct epd_group *group);
/* Open fds of this process. */
int count_fds(void);

#endif
