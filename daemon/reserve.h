/* The fds that ranks may not have, so that people get in when ranks have used up the rest: accepting a control
 * session and answering it takes a few. The kernel gives out the lowest number that is free; one this close to the
 * limit says that all below it are taken, and what is left is the reserve. Loop thread. */
#ifndef EPD_DAEMON_RESERVE_H
#define EPD_DAEMON_RESERVE_H

/* A control connection, its document, and what the document looks at; for a few people at once. With a small
 * RLIMIT_NOFILE a quarter of it at most. */
#define RESERVE_FDS 8

/* What a rank is told then. */
#define RESERVE_REFUSAL "the daemon has no fds left for ranks (RLIMIT_NOFILE)"

/* 1 if this fd, just made for a rank, comes out of the reserve: it is to be closed and the rank refused. */
int reserve_touched(int fd);
/* The same for the fd that would be made next; any_fd: one that is open. */
int reserve_next(int any_fd);

#endif
