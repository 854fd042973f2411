/* The service manager's notification protocol: one datagram to $NOTIFY_SOCKET. Does nothing without it.
 * Supervisor. */
#ifndef EPD_DAEMON_NOTIFY_H
#define EPD_DAEMON_NOTIFY_H

/* A manager that does not read is waited for this long. */
#define NOTIFY_MS 200

/* "READY=1", "STOPPING=1", "STATUS=..."; several with '\n' between. 1 if it was sent. */
int notify_send(const char *state);

#endif
