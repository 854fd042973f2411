#include "daemon/config.h"

#include <errno.h>
#include <ini.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/log.h"
#include "proto/limits.h"

#define KIB 1024ull
#define MIB (1024 * KIB)

#define HOST_DEVICES_DEFAULT 4

static char *text_of(struct config *config, const struct config_key *key)
{
    return (char *)config + key->offset;
}

static uint64_t *number_of(struct config *config, const struct config_key *key)
{
    return (uint64_t *)(void *)((char *)config + key->offset);
}

static uint64_t number_in(const struct config *config, const struct config_key *key)
{
    return *(const uint64_t *)(const void *)((const char *)config + key->offset);
}

static const char *text_in(const struct config *config, const struct config_key *key)
{
    return (const char *)config + key->offset;
}

/* Suffixes and what they multiply by. */
struct unit {
    const char *suffix;
    uint64_t factor;
};

static const struct unit byte_units[] = {
    {"", 1}, {"K", KIB}, {"M", MIB}, {"G", 1024 * MIB}, {"T", 1024 * 1024 * MIB}};
static const struct unit time_units[] = {{"ms", 1}, {"s", 1000}, {"m", 60000}};
static const struct unit no_units[] = {{"", 1}};

static int parse_number(const char *value, int base, const struct unit *units, size_t n_units,
                        uint64_t *number)
{
    if (value[0] < '0' || value[0] > '9')
        return 0;
    char *end;
    errno = 0;
    uint64_t n = strtoull(value, &end, base);
    if (errno)
        return 0;
    for (size_t i = 0; i < n_units; i++)
        if (strcmp(end, units[i].suffix) == 0 && n <= UINT64_MAX / units[i].factor) {
            *number = n * units[i].factor;
            return 1;
        }
    return 0;
}

static int parse_typed(const struct config_key *key, const char *value, uint64_t *number)
{
    switch (key->type) {
    case CONFIG_COUNT:
        return parse_number(value, 10, no_units, 1, number);
    case CONFIG_MODE:
        return parse_number(value, 8, no_units, 1, number);
    case CONFIG_BYTES:
        return parse_number(value, 10, byte_units, sizeof(byte_units) / sizeof(byte_units[0]), number);
    case CONFIG_DURATION:
        return parse_number(value, 10, time_units, sizeof(time_units) / sizeof(time_units[0]), number);
    default:
        return 0;
    }
}

/* "a number from 1 to 4096": what a key allows, for its error text. */
static void describe_allowed(const struct config_key *key, char *text, size_t bytes)
{
    char max[32] = "any size";
    if (key->max != UINT64_MAX)
        (void)snprintf(max, sizeof(max), "%" PRIu64, key->max);
    switch (key->type) {
    case CONFIG_WORD: {
        size_t length = (size_t)snprintf(text, bytes, "one of");
        for (const char *const *word = key->words; *word && length < bytes; word++)
            length += (size_t)snprintf(text + length, bytes - length, " %s", *word);
        break;
    }
    case CONFIG_MODE:
        (void)snprintf(text, bytes, "an octal file mode up to %04" PRIo64, key->max);
        break;
    case CONFIG_BYTES:
        (void)snprintf(text, bytes, "bytes from %" PRIu64 " to %s, with K, M, G or T", key->min, max);
        break;
    case CONFIG_DURATION:
        (void)snprintf(text, bytes, "a time with ms, s or m, from %" PRIu64 "ms to %sms", key->min, max);
        break;
    case CONFIG_TEXT:
        (void)snprintf(text, bytes, "one line of at most %d bytes", CONFIG_TEXT_BYTES - 1);
        break;
    default:
        (void)snprintf(text, bytes, "a number from %" PRIu64 " to %s", key->min, max);
    }
}

static int set_word(struct config *config, const struct config_key *key, const char *value)
{
    for (uint64_t i = 0; key->words[i]; i++)
        if (strcmp(key->words[i], value) == 0) {
            *number_of(config, key) = i;
            return 1;
        }
    return 0;
}

/* What is rendered line by line is read back line by line, and goes into logs and documents. */
static int is_one_line(const char *value)
{
    for (; *value; value++)
        if ((unsigned char)*value < ' ' || *value == 0x7f)
            return 0;
    return 1;
}

static int set_value(struct config *config, const struct config_key *key, const char *value)
{
    if (key->type == CONFIG_WORD)
        return set_word(config, key, value);
    if (key->type == CONFIG_TEXT) {
        size_t length = strlen(value);
        if (length >= CONFIG_TEXT_BYTES || !is_one_line(value))
            return 0;
        memcpy(text_of(config, key), value, length + 1);
        return 1;
    }
    uint64_t number;
    if (!parse_typed(key, value, &number) || number < key->min || number > key->max)
        return 0;
    *number_of(config, key) = number;
    return 1;
}

enum epd_status config_set(struct config *config, const struct config_key *key, const char *value,
                           const char *where, struct epd_error *error)
{
    if (set_value(config, key, value))
        return EPD_OK;
    char allowed[128];
    describe_allowed(key, allowed, sizeof(allowed));
    return error_set(error, EPD_INVALID_ARGUMENT, "%s: %s '%.40s', want %s", where, key->key, value, allowed);
}

void config_init(struct config *config)
{
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    memset(config, 0, sizeof(*config));
    for (size_t i = 0; i < n_keys; i++)
        if (!set_value(config, &keys[i], keys[i].fallback))
            abort(); /* the table contradicts itself; every test run would see it */
}

struct reader {
    struct config *config;
    const char *name;
    struct epd_error *error;
};

static const struct config_key *find_key(const char *section, const char *name)
{
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++)
        if (strcmp(keys[i].section, section) == 0 && strcmp(keys[i].key, name) == 0)
            return &keys[i];
    return NULL;
}

static const char *section_of(const char *name)
{
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    for (size_t i = 0; i < n_keys; i++)
        if (strcmp(keys[i].key, name) == 0)
            return keys[i].section;
    return NULL;
}

static enum epd_status read_pair(const struct reader *reader, const char *section, const char *name,
                                 const char *value)
{
    const struct config_key *key = find_key(section, name);
    if (key) /* the line number is known only to the caller's loop, which puts it in front */
        return config_set(reader->config, key, value, "", reader->error);
    const char *right = section_of(name);
    if (right)
        return error_set(reader->error, EPD_INVALID_ARGUMENT, ": %s stands in [%s], want [%s]", name, section,
                         right);
    return error_set(reader->error, EPD_INVALID_ARGUMENT, ": unknown key %.64s in [%.32s]", name, section);
}

/* inih: 0 stops with the line number as the result, because only the first error is of interest. */
static int on_pair(void *user, const char *section, const char *name, const char *value)
{
    struct reader *reader = user;
    if (reader->error->status != EPD_OK)
        return 0;
    return read_pair(reader, section, name, value ? value : "") == EPD_OK;
}

/* Turns what inih returned and what on_pair left into one error with file and line. */
static enum epd_status finish_read(const struct reader *reader, int result)
{
    if (result == 0)
        return EPD_OK;
    if (result < 0)
        return error_set(reader->error, EPD_SYSTEM, "config %.150s: cannot be read: %s", reader->name,
                         strerror(errno));
    char text[EPD_ERROR_TEXT_BYTES] = ": not a section and not `key = value` of less than 200 bytes";
    if (reader->error->status != EPD_OK)
        (void)snprintf(text, sizeof(text), "%s", reader->error->text);
    const char *rest = text[0] == ':' && text[1] == ' ' ? text + 2 : text;
    return error_set(reader->error, EPD_INVALID_ARGUMENT, "%.100s:%d: %.140s", reader->name, result, rest);
}

enum epd_status config_read(struct config *config, const char *path, struct epd_error *error)
{
    struct config fresh = *config;
    struct reader reader = {&fresh, path, error};
    error->status = EPD_OK;
    errno = 0;
    enum epd_status status = finish_read(&reader, ini_parse(path, on_pair, &reader));
    if (status != EPD_OK)
        return status;
    if ((size_t)snprintf(fresh.file, sizeof(fresh.file), "%s", path) >= sizeof(fresh.file))
        return error_set(error, EPD_INVALID_ARGUMENT, "config file name: %zu bytes, at most %d", strlen(path),
                         CONFIG_TEXT_BYTES - 1);
    *config = fresh;
    return EPD_OK;
}

enum epd_status config_parse(struct config *config, const char *text, const char *name,
                             struct epd_error *error)
{
    struct config fresh = *config;
    struct reader reader = {&fresh, name, error};
    error->status = EPD_OK;
    enum epd_status status = finish_read(&reader, ini_parse_string(text, on_pair, &reader));
    if (status == EPD_OK)
        *config = fresh;
    return status;
}

static enum epd_status default_socket(struct config *config, struct epd_error *error)
{
    if (config->socket[0])
        return EPD_OK;
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    int n = snprintf(config->socket, sizeof(config->socket), "%s/epd/epd.sock",
                     runtime && runtime[0] == '/' ? runtime : "/run");
    if (n < (int)sizeof(config->socket))
        return EPD_OK;
    return error_set(error, EPD_INVALID_ARGUMENT, "XDG_RUNTIME_DIR: %zu bytes, too long for a socket path",
                     strlen(runtime));
}

static enum epd_status default_control(struct config *config, struct epd_error *error)
{
    if (config->control_socket[0])
        return EPD_OK;
    const char *slash = strrchr(config->socket, '/');
    int directory = slash ? (int)(slash - config->socket) + 1 : 0;
    int n = snprintf(config->control_socket, sizeof(config->control_socket), "%.*sepd-control.sock",
                     directory, config->socket);
    if (n < (int)sizeof(config->control_socket))
        return EPD_OK;
    return error_set(error, EPD_INVALID_ARGUMENT, "socket: %zu bytes, too long", strlen(config->socket));
}

static enum epd_status check_uids(const struct config *config, struct epd_error *error)
{
    const char *at = config->allow_uids;
    uint32_t n_uids = 0;
    while (*at) {
        char *end;
        errno = 0;
        unsigned long uid = strtoul(at, &end, 10);
        if (end == at || errno || uid > UINT32_MAX || (*end && *end != ',') || *at == '-')
            return error_set(error, EPD_INVALID_ARGUMENT, "allow_uids '%.60s', want uids with commas between",
                             config->allow_uids);
        if (++n_uids > CONFIG_MAX_UIDS)
            return error_set(error, EPD_INVALID_ARGUMENT, "allow_uids: more than %d uids", CONFIG_MAX_UIDS);
        at = *end ? end + 1 : end;
    }
    return EPD_OK;
}

static enum epd_status check_devices(const struct config *config, struct epd_error *error)
{
    if (config->backend != CONFIG_BACKEND_HOST || !config->devices[0])
        return EPD_OK;
    uint64_t n = 0;
    if (parse_number(config->devices, 10, no_units, 1, &n) && n >= 1 && n <= EPD_MAX_DEVICES)
        return EPD_OK;
    return error_set(error, EPD_INVALID_ARGUMENT,
                     "devices '%.60s' with backend host, want a number from 1 to %d", config->devices,
                     EPD_MAX_DEVICES);
}

enum epd_status config_finish(struct config *config, struct epd_error *error)
{
    enum epd_status status = default_socket(config, error);
    if (status == EPD_OK)
        status = default_control(config, error);
    if (status == EPD_OK)
        status = check_uids(config, error);
    if (status == EPD_OK)
        status = check_devices(config, error);
    if (status != EPD_OK)
        return status;
    if (strcmp(config->socket, config->control_socket) == 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "socket and control_socket are both %.180s",
                         config->socket);
    if (config->warn_ms > config->stuck_ms || config->stuck_ms > config->dead_ms)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "timers: warn %" PRIu64 "ms, stuck %" PRIu64 "ms, dead %" PRIu64
                         "ms, want warn <= stuck <= dead",
                         config->warn_ms, config->stuck_ms, config->dead_ms);
    return EPD_OK;
}

void config_format(const struct config *config, const struct config_key *key, char *text, size_t bytes)
{
    if (key->type == CONFIG_TEXT) {
        (void)snprintf(text, bytes, "%s", text_in(config, key));
        return;
    }
    uint64_t number = number_in(config, key);
    if (key->type == CONFIG_WORD)
        (void)snprintf(text, bytes, "%s", key->words[number]);
    else if (key->type == CONFIG_MODE)
        (void)snprintf(text, bytes, "%04" PRIo64, number);
    else if (key->type == CONFIG_DURATION)
        (void)snprintf(text, bytes, "%" PRIu64 "%s", number % 1000 ? number : number / 1000,
                       number % 1000 ? "ms" : "s");
    else
        (void)snprintf(text, bytes, "%" PRIu64, number);
}

enum epd_status config_render(const struct config *config, char *text, size_t bytes, struct epd_error *error)
{
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    size_t length = 0;
    const char *section = "";
    for (size_t i = 0; i < n_keys && length < bytes; i++) {
        char value[CONFIG_TEXT_BYTES];
        config_format(config, &keys[i], value, sizeof(value));
        if (strcmp(section, keys[i].section) != 0) {
            section = keys[i].section;
            length += (size_t)snprintf(text + length, bytes - length, "[%s]\n", section);
        }
        if (length < bytes)
            length += (size_t)snprintf(text + length, bytes - length, "%s = %s\n", keys[i].key, value);
    }
    if (length >= bytes)
        return error_set(error, EPD_INTERNAL, "config: %zu bytes rendered, room for %zu", length, bytes);
    return EPD_OK;
}

/* The value is all that follows " = ", whatever it holds: the reader of files knows comments, and lines of less than 200 bytes
 * only. */
static enum epd_status take_rendered(struct config *config, const char *section, char *line,
                                     struct epd_error *error)
{
    char *equals = strstr(line, " = ");
    if (!equals)
        return error_set(error, EPD_PROTOCOL, "configuration: '%.60s', want key = value", line);
    *equals = 0;
    const struct config_key *key = find_key(section, line);
    if (!key)
        return error_set(error, EPD_PROTOCOL, "configuration: unknown key %.64s in [%.32s]", line, section);
    return config_set(config, key, equals + 3, "configuration", error);
}

enum epd_status config_take_rendered(struct config *config, char *text, struct epd_error *error)
{
    struct config fresh = *config;
    char *rest = NULL, section[32] = "";
    enum epd_status status = EPD_OK;
    for (char *line = strtok_r(text, "\n", &rest); line && status == EPD_OK;
         line = strtok_r(NULL, "\n", &rest)) {
        if (line[0] == '[')
            (void)snprintf(section, sizeof(section), "%.*s", (int)strcspn(line + 1, "]"), line + 1);
        else
            status = take_rendered(&fresh, section, line, error);
    }
    if (status == EPD_OK)
        *config = fresh;
    return status;
}

static int same_value(const struct config *a, const struct config *b, const struct config_key *key)
{
    if (key->type == CONFIG_TEXT)
        return strcmp(text_in(a, key), text_in(b, key)) == 0;
    return number_in(a, key) == number_in(b, key);
}

uint32_t config_reload(struct config *config, const struct config *fresh, uint32_t *n_ignored)
{
    size_t n_keys;
    const struct config_key *keys = config_keys(&n_keys);
    uint32_t n_changed = 0;
    *n_ignored = 0;
    for (size_t i = 0; i < n_keys; i++) {
        if (same_value(config, fresh, &keys[i]))
            continue;
        if (!keys[i].reloadable) {
            (*n_ignored)++;
            continue;
        }
        n_changed++;
        if (keys[i].type == CONFIG_TEXT)
            memcpy(text_of(config, &keys[i]), text_in(fresh, &keys[i]), CONFIG_TEXT_BYTES);
        else
            *number_of(config, &keys[i]) = number_in(fresh, &keys[i]);
    }
    return n_changed;
}

int config_allows_uid(const struct config *config, uint32_t uid)
{
    if (!config->allow_uids[0])
        return 1;
    for (const char *at = config->allow_uids; *at;) {
        char *end;
        if (strtoul(at, &end, 10) == uid)
            return 1;
        at = *end ? end + 1 : end;
    }
    return 0;
}

uint32_t config_host_devices(const struct config *config)
{
    return config->devices[0] ? (uint32_t)strtoul(config->devices, NULL, 10) : HOST_DEVICES_DEFAULT;
}
