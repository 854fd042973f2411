/* A build without groups across nodes (EPD_FABRIC): whoever asks for a fabric is told so, and nothing else of it runs. */
#include <stdlib.h>

#include "daemon/fabric_auth.h"

int fabric_auth_available(struct epd_error *reason)
{
    (void)error_set(reason, EPD_UNSUPPORTED, "fabric: this build has no groups across nodes (EPD_FABRIC)");
    return 0;
}

enum epd_status fabric_auth_read(const char *path, uint8_t key[FABRIC_KEY_BYTES], struct epd_error *error)
{
    (void)path, (void)key;
    (void)fabric_auth_available(error);
    return error->status;
}

/* Links are made by a fabric alone, and there is none. */
static _Noreturn void unreachable(void)
{
    abort();
}

void fabric_auth_hello(struct fabric_hello *hello, uint32_t node, uint32_t n_nodes)
{
    (void)hello, (void)node, (void)n_nodes;
    unreachable();
}

int fabric_auth_hello_known(const struct fabric_hello *hello)
{
    (void)hello;
    unreachable();
}

void fabric_auth_prove(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                       const struct fabric_hello *connector, const struct fabric_hello *listener,
                       uint8_t mac[FABRIC_MAC_BYTES])
{
    (void)key, (void)side, (void)connector, (void)listener, (void)mac;
    unreachable();
}

int fabric_auth_check(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                      const struct fabric_hello *connector, const struct fabric_hello *listener,
                      const uint8_t mac[FABRIC_MAC_BYTES])
{
    (void)key, (void)side, (void)connector, (void)listener, (void)mac;
    unreachable();
}

void fabric_auth_derive(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                        const struct fabric_hello *connector, const struct fabric_hello *listener,
                        struct fabric_keys *keys)
{
    (void)key, (void)side, (void)connector, (void)listener, (void)keys;
    unreachable();
}

void fabric_auth_mark(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                      uint8_t mac[FABRIC_MAC_BYTES])
{
    (void)key, (void)number, (void)data, (void)bytes, (void)mac;
    unreachable();
}

int fabric_auth_marked(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                       const uint8_t mac[FABRIC_MAC_BYTES])
{
    (void)key, (void)number, (void)data, (void)bytes, (void)mac;
    unreachable();
}
