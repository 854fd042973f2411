#include "daemon/fabric_dial.h"

#include <stdio.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/tcp_port.h"
#include "daemon/worker.h"

static void on_connection(uv_stream_t *server, int status)
{
    struct fabric *fabric = server->data;
    struct epd_error error = {0};
    struct fabric_link *link = NULL;
    size_t place = 0;
    while (place < FABRIC_MAX_STRANGERS && fabric->strangers[place])
        place++;
    if (status < 0)
        return;
    if (fabric_link_accept(&fabric->owner, server, &link, &error) != EPD_OK) {
        (void)log_limited(fabric->worker->log, LOG_WARN, "fabric_accept", clock_ns(), "%s", error.text);
        return;
    }
    if (place == FABRIC_MAX_STRANGERS) {
        (void)error_set(&error, EPD_QUOTA, "%d connections have yet to show the secret",
                        FABRIC_MAX_STRANGERS);
        fabric_link_close(link, &error);
        return;
    }
    fabric->strangers[place] = link;
}

static int connecting(const struct fabric *fabric)
{
    return fabric->looking_up || fabric->strangers[0] || fabric->nodes[0].link;
}

static void retry_later(struct fabric *fabric, const char *why)
{
    (void)snprintf(fabric->last_error, sizeof(fabric->last_error), "%.100s: %.100s",
                   fabric->config.rendezvous, why);
    fabric->retry_ms =
        fabric->retry_ms * 2 < FABRIC_RETRY_MAX_MS ? fabric->retry_ms * 2 : FABRIC_RETRY_MAX_MS;
    fabric->retry_at_ns = clock_ns() + clock_ms_to_ns(fabric->retry_ms);
}

static void on_address(uv_getaddrinfo_t *lookup, int status, struct addrinfo *found)
{
    struct fabric *fabric = lookup->data;
    struct epd_error error = {0};
    fabric->looking_up = 0;
    if (status < 0)
        retry_later(fabric, uv_strerror(status));
    else if (!fabric->stopped &&
             fabric_link_connect(&fabric->owner, found->ai_addr, &fabric->strangers[0], &error) != EPD_OK)
        retry_later(fabric, error.text);
    uv_freeaddrinfo(found);
}

void fabric_dial(struct fabric *fabric, uint64_t now_ns)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (connecting(fabric) || now_ns < fabric->retry_at_ns)
        return;
    retry_later(fabric, fabric->last_error[0] ? "trying" : "first try");
    fabric->looking_up = 1;
    const int failed = uv_getaddrinfo(&fabric->worker->loop, &fabric->lookup, on_address, fabric->config.host,
                                      fabric->config.port, &hints);
    if (failed) {
        fabric->looking_up = 0;
        retry_later(fabric, uv_strerror(failed));
    }
}

enum epd_status fabric_listen(struct fabric *fabric, struct epd_error *error)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    const char *host = fabric->config.host, *port = fabric->config.port;
    const char *shown = fabric->config.rendezvous;
    tcp_port_advise(fabric->worker->log, port);
    uv_loop_t *loop = &fabric->worker->loop;
    int failed = uv_getaddrinfo(loop, &fabric->lookup, NULL, host, port, &hints);
    if (failed) /* other than these two it may work later: a name server that is not up yet */
        return error_set(
            error, failed == UV_EAI_NONAME || failed == UV_EAI_SERVICE ? EPD_INVALID_ARGUMENT : EPD_SYSTEM,
            "fabric rendezvous %.150s: %s", shown, uv_strerror(failed));
    struct addrinfo *found = fabric->lookup.addrinfo;
    (void)uv_tcp_init(loop, &fabric->server);
    fabric->server.data = fabric;
    int fd = -1;
    struct epd_error why;
    const enum epd_status status = tcp_port_listen(found->ai_addr, found->ai_addrlen, FABRIC_MAX_STRANGERS,
                                                   TCP_PORT_PATIENCE_MS, &fd, &why);
    uv_freeaddrinfo(found);
    if (status != EPD_OK)
        return error_set(error, status, "fabric rendezvous %.120s: %.120s", shown, why.text);
    failed = uv_tcp_open(&fabric->server, fd);
    if (failed)
        (void)close(fd);
    else
        failed = uv_listen((uv_stream_t *)&fabric->server, FABRIC_MAX_STRANGERS, on_connection);
    if (failed)
        return error_set(error, EPD_SYSTEM, "fabric rendezvous %.150s: %s", shown, uv_strerror(failed));
    return EPD_OK;
}
