#include "daemon/fabric_auth.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sodium.h>

_Static_assert(FABRIC_MAC_BYTES == crypto_auth_hmacsha256_BYTES, "the hash is HMAC-SHA-256");
_Static_assert(FABRIC_KEY_BYTES == crypto_auth_hmacsha256_KEYBYTES, "and its key");

static const uint8_t magic[8] = "epdfab1";

int fabric_auth_available(struct epd_error *reason)
{
    if (sodium_init() >= 0)
        return 1;
    (void)error_set(reason, EPD_SYSTEM, "fabric: libsodium finds no source of random numbers");
    return 0;
}

static enum epd_status read_secret(int fd, const char *path, uint8_t *secret, size_t *bytes,
                                   struct epd_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric secret_file %.120s: no plain file", path);
    if (info.st_mode & 077)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "fabric secret_file %.120s: mode %03o lets others in, want 0600", path,
                         (unsigned)info.st_mode & 0777u);
    const ssize_t n = read(fd, secret, FABRIC_MAX_SECRET_BYTES);
    if (n < 0)
        return error_set(error, EPD_SYSTEM, "fabric secret_file %.120s: %s", path, strerror(errno));
    *bytes = (size_t)n;
    while (*bytes && (secret[*bytes - 1] == '\n' || secret[*bytes - 1] == '\r'))
        --*bytes;
    if (*bytes < FABRIC_MIN_SECRET_BYTES)
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric secret_file %.120s: %zu bytes, want %d or more",
                         path, *bytes, FABRIC_MIN_SECRET_BYTES);
    return EPD_OK;
}

enum epd_status fabric_auth_read(const char *path, uint8_t key[FABRIC_KEY_BYTES], struct epd_error *error)
{
    uint8_t secret[FABRIC_MAX_SECRET_BYTES];
    size_t bytes = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric secret_file %.120s: %s", path, strerror(errno));
    const enum epd_status status = read_secret(fd, path, secret, &bytes, error);
    (void)close(fd);
    if (status == EPD_OK)
        (void)crypto_hash_sha256(key, secret, bytes);
    sodium_memzero(secret, sizeof(secret));
    return status;
}

void fabric_auth_hello(struct fabric_hello *hello, uint32_t node, uint32_t n_nodes)
{
    *hello = (struct fabric_hello){.node = (uint8_t)node, .n_nodes = (uint8_t)n_nodes};
    memcpy(hello->magic, magic, sizeof(magic));
    randombytes_buf(hello->challenge, sizeof(hello->challenge));
}

int fabric_auth_hello_known(const struct fabric_hello *hello)
{
    return memcmp(hello->magic, magic, sizeof(magic)) == 0;
}

/* What is hashed differs in its first byte for every use. */
static void hash(const uint8_t *key, uint8_t use, const struct fabric_hello *connector,
                 const struct fabric_hello *listener, uint8_t mac[FABRIC_MAC_BYTES])
{
    crypto_auth_hmacsha256_state state;
    (void)crypto_auth_hmacsha256_init(&state, key, FABRIC_KEY_BYTES);
    (void)crypto_auth_hmacsha256_update(&state, &use, 1);
    (void)crypto_auth_hmacsha256_update(&state, (const uint8_t *)connector, sizeof(*connector));
    (void)crypto_auth_hmacsha256_update(&state, (const uint8_t *)listener, sizeof(*listener));
    (void)crypto_auth_hmacsha256_final(&state, mac);
}

void fabric_auth_prove(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                       const struct fabric_hello *connector, const struct fabric_hello *listener,
                       uint8_t mac[FABRIC_MAC_BYTES])
{
    hash(key, side == FABRIC_LISTENER ? 'L' : 'C', connector, listener, mac);
}

int fabric_auth_check(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                      const struct fabric_hello *connector, const struct fabric_hello *listener,
                      const uint8_t mac[FABRIC_MAC_BYTES])
{
    uint8_t want[FABRIC_MAC_BYTES];
    fabric_auth_prove(key, side, connector, listener, want);
    return sodium_memcmp(want, mac, sizeof(want)) == 0;
}

void fabric_auth_derive(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                        const struct fabric_hello *connector, const struct fabric_hello *listener,
                        struct fabric_keys *keys)
{
    hash(key, 'l', connector, listener, side == FABRIC_LISTENER ? keys->send : keys->receive);
    hash(key, 'c', connector, listener, side == FABRIC_LISTENER ? keys->receive : keys->send);
}

void fabric_auth_mark(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                      uint8_t mac[FABRIC_MAC_BYTES])
{
    const uint64_t head[2] = {number, bytes};
    crypto_auth_hmacsha256_state state;
    (void)crypto_auth_hmacsha256_init(&state, key, FABRIC_KEY_BYTES);
    (void)crypto_auth_hmacsha256_update(&state, (const uint8_t *)head, sizeof(head));
    (void)crypto_auth_hmacsha256_update(&state, data, bytes);
    (void)crypto_auth_hmacsha256_final(&state, mac);
}

int fabric_auth_marked(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                       const uint8_t mac[FABRIC_MAC_BYTES])
{
    uint8_t want[FABRIC_MAC_BYTES];
    fabric_auth_mark(key, number, data, bytes, want);
    return sodium_memcmp(want, mac, sizeof(want)) == 0;
}
