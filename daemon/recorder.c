#include "daemon/recorder.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/clock.h"

static const char *const state_names[] = {"empty", "gathering", "running", "done"};

enum epd_status recorder_create(int *fd, struct epd_error *error)
{
    int made = memfd_create("epd-recorder", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (made < 0)
        return error_set(error, EPD_SYSTEM, "recorder: memfd_create: %s", strerror(errno));
    if (ftruncate(made, sizeof(struct recorder_ring)) != 0 ||
        fcntl(made, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        enum epd_status status =
            error_set(error, EPD_SYSTEM, "recorder: sizing its memfd: %s", strerror(errno));
        close(made);
        return status;
    }
    *fd = made;
    return EPD_OK;
}

enum epd_status recorder_open(struct recorder *recorder, int fd, struct epd_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || info.st_size != (off_t)sizeof(struct recorder_ring))
        return error_set(error, EPD_INTERNAL, "recorder: fd %d is not a recorder", fd);
    void *ring = mmap(NULL, sizeof(struct recorder_ring), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ring == MAP_FAILED)
        return error_set(error, EPD_SYSTEM, "recorder: mmap: %s", strerror(errno));
    recorder->ring = ring;
    return EPD_OK;
}

void recorder_close(struct recorder *recorder)
{
    if (recorder->ring)
        (void)munmap(recorder->ring, sizeof(*recorder->ring));
    recorder->ring = NULL;
}

void recorder_clear(struct recorder *recorder)
{
    memset(recorder->ring, 0, sizeof(*recorder->ring));
    recorder->ring->magic = RECORDER_MAGIC;
    recorder->ring->n_entries = RECORDER_N_ENTRIES;
}

struct recorder_entry *recorder_begin(struct recorder *recorder)
{
    const uint64_t serial = ++recorder->ring->n_written;
    struct recorder_entry *entry = &recorder->ring->entries[serial % RECORDER_N_ENTRIES];
    *entry = (struct recorder_entry){.serial = serial, .rank = -1};
    return entry;
}

struct recorder_entry *recorder_find(struct recorder *recorder, uint64_t serial)
{
    struct recorder_entry *entry = &recorder->ring->entries[serial % RECORDER_N_ENTRIES];
    return entry->serial == serial ? entry : NULL;
}

enum epd_status recorder_copy(const struct recorder *recorder, struct recorder *copy, struct epd_error *error)
{
    struct recorder_ring *ring = malloc(sizeof(*ring));
    if (!ring)
        return error_set(error, EPD_NO_MEMORY, "recorder: no memory for a copy of %zu bytes", sizeof(*ring));
    memcpy(ring, recorder->ring, sizeof(*ring));
    copy->ring = ring;
    return EPD_OK;
}

void recorder_copy_free(struct recorder *copy)
{
    free(copy->ring);
    copy->ring = NULL;
}

static json_t *missing_ranks(const struct recorder_entry *entry)
{
    json_t *missing = json_array();
    if (entry->ordinal)
        for (uint32_t rank = 0; rank < entry->world_size && rank < 64; rank++)
            if (!(entry->arrived >> rank & 1))
                (void)json_array_append_new(missing, json_integer(rank));
    return missing;
}

static json_t *phases(const struct recorder_entry *entry)
{
    json_t *object = json_object();
    for (int phase = 1; phase < EPD_PHASE_COUNT; phase++)
        if (entry->phase_ns[phase])
            (void)json_object_set_new(object, phase_name((enum epd_phase)phase),
                                      json_integer((json_int_t)entry->phase_ns[phase]));
    return object;
}

static json_int_t span(uint64_t from_ns, uint64_t to_ns)
{
    return from_ns && to_ns > from_ns ? (json_int_t)(to_ns - from_ns) : 0;
}

/* After a crash an entry may be half written: every number that indexes something is bounded here. */
static json_t *entry_document(const struct recorder_entry *entry, uint64_t now_ns)
{
    char text[RECORDER_TEXT_BYTES];
    (void)snprintf(text, sizeof(text), "%.*s", RECORDER_TEXT_BYTES - 1, entry->text);
    const enum recorder_state state = entry->state <= RECORDER_DONE ? entry->state : RECORDER_EMPTY;
    return json_pack(
        "{s:I s:I s:I s:I s:s s:s s:s s:s s:i s:o s:I s:I s:I s:I s:o s:s}", "serial",
        (json_int_t)entry->serial, "group_id", (json_int_t)entry->group_id, "ordinal",
        (json_int_t)entry->ordinal, "plan_id", (json_int_t)entry->plan_id, "op",
        op_name((enum epd_op)entry->op), "state", state_names[state], "status",
        status_name((enum epd_status)entry->status), "phase", phase_name((enum epd_phase)entry->phase),
        "rank", (int)entry->rank, "missing", missing_ranks(entry), "age_ms",
        span(entry->first_ns, now_ns) / (json_int_t)CLOCK_NS_PER_MS, "gather_ns",
        span(entry->first_ns, entry->last_ns), "wait_ns", span(entry->last_ns, entry->submit_ns), "run_ns",
        span(entry->submit_ns, entry->end_ns), "phase_ns", phases(entry), "text", text);
}

json_t *recorder_document(const struct recorder *recorder, uint64_t now_ns)
{
    const struct recorder_ring *ring = recorder->ring;
    json_t *ops = json_array();
    const uint64_t last = ring->n_written;
    const uint64_t first = last > RECORDER_N_ENTRIES ? last - RECORDER_N_ENTRIES + 1 : 1;
    for (uint64_t serial = first; serial <= last; serial++) {
        const struct recorder_entry *entry = &ring->entries[serial % RECORDER_N_ENTRIES];
        json_t *object = entry->serial == serial ? entry_document(entry, now_ns) : NULL;
        if (object)
            (void)json_array_append_new(ops, object);
    }
    return ops;
}
