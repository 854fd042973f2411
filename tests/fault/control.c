#include "tests/fault/control.h"

#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "tests/fault/wire.h"

#define CONTROL_DEADLINE_MS 5000

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static json_t *read_document(const struct wire *wire)
{
    if (wire->reply.kind != MESSAGE_REPLY_DOCUMENT || wire->reply_fd < 0)
        return NULL;
    size_t bytes = wire->reply.reply_document.bytes;
    void *text = mmap(NULL, bytes, PROT_READ, MAP_SHARED, wire->reply_fd, 0);
    if (text == MAP_FAILED)
        return NULL;
    json_t *document = json_loadb(text, bytes, JSON_DISABLE_EOF_CHECK, NULL);
    munmap(text, bytes);
    return document;
}

static json_t *converse(struct wire *wire, struct message *request, const char *path)
{
    json_t *document = NULL;

    if (wire_connect(wire, path) != 0)
        return NULL;
    if (wire_send(wire, request, -1) == 0 && wire_receive(wire, CONTROL_DEADLINE_MS) == WIRE_MESSAGE)
        document = read_document(wire);
    wire_close(wire);
    return document;
}

json_t *control_ask(const char *path, enum control_verb verb, double *elapsed_ms)
{
    struct wire wire;
    struct message request = {.kind = MESSAGE_CONTROL, .control = {.verb = verb}};
    double begin = now_ms();

    json_t *document = converse(&wire, &request, path);
    if (elapsed_ms)
        *elapsed_ms = now_ms() - begin;
    return document;
}

int control_evict(const char *path, uint64_t session_id, const char *reason)
{
    struct wire wire;
    struct message request = {.kind = MESSAGE_CONTROL,
                              .control = {.verb = CONTROL_EVICT, .session_id = session_id}};

    snprintf(request.control.reason, sizeof request.control.reason, "%s", reason);
    json_t *document = converse(&wire, &request, path);
    json_decref(document);
    return document != NULL;
}

long long control_number(const json_t *document, const char *path)
{
    while (document && *path) {
        char key[64];
        size_t length = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)length, path);
        document = json_object_get(document, key);
        path += length + (path[length] == '.');
    }
    return json_is_integer(document) ? json_integer_value(document) : -1;
}

long long control_sum(const json_t *document, const char *array, const char *key)
{
    long long sum = 0;
    size_t i;
    json_t *item;

    json_array_foreach (json_object_get(document, array), i, item)
        sum += json_integer_value(json_object_get(item, key));
    return sum;
}
