/* The line between supervisor and worker: a SEQPACKET pair. Its end is the other's end. One thread on each side. Datagrams:
 *   supervisor -> worker   'C', config file name, '\n', the configuration as INI text: at the start, and after each SIGHUP
 *                          '?': does your loop come round?
 *   worker -> supervisor   'L': it listens and answers; 'R': ready, which may be later where other nodes have to come;
 *                          '!': it does (answer to '?'); 'E': it has served whom it had to, and ends: its loop is over */
#ifndef EPD_DAEMON_CHANNEL_H
#define EPD_DAEMON_CHANNEL_H

#include "daemon/config.h"

enum channel_event {
    CHANNEL_NOTHING = 0, /* would block */
    CHANNEL_CONFIG,
    CHANNEL_LISTENING,
    CHANNEL_READY,
    CHANNEL_QUESTION,
    CHANNEL_ANSWER,
    CHANNEL_ENDING,
    CHANNEL_ENDED, /* the other side is gone */
};

/* Both ends close-on-exec. Nothing is waited for in sending: EPD_SYSTEM when the other side does not read. */
EPD_MUST_CHECK enum epd_status channel_create(int fds[2], struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_config(int fd, const struct config *config,
                                                   struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_listening(int fd, struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_ready(int fd, struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_question(int fd, struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_answer(int fd, struct epd_error *error);
EPD_MUST_CHECK enum epd_status channel_send_ending(int fd, struct epd_error *error);
/* CHANNEL_CONFIG fills *config; a datagram that is none of the above ends the channel (CHANNEL_ENDED). */
enum channel_event channel_receive(int fd, struct config *config, struct epd_error *error);

#endif
