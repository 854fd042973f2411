#include "daemon/registry.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

#define FIRST_CAPACITY 64

static const char *const kind_names[REGISTRY_KIND_COUNT] = {"session", "group", "buffer", "plan"};

void registry_init(struct registry *registry, uint64_t generation)
{
    *registry = (struct registry){.base = generation * REGISTRY_IDS_PER_WORKER};
    for (int kind = 0; kind < REGISTRY_KIND_COUNT; kind++)
        registry->tables[kind].last_id = registry->base;
}

void registry_fini(struct registry *registry)
{
    for (int kind = 0; kind < REGISTRY_KIND_COUNT; kind++) {
        assert(registry->tables[kind].n_used == 0);
        free(registry->tables[kind].slots);
        registry->tables[kind].slots = NULL;
    }
}

/* Fibonacci hashing: ids are consecutive, the multiplier spreads them over the whole table. */
static size_t home_of(const struct registry_table *table, uint64_t id)
{
    return (size_t)((id * 0x9e3779b97f4a7c15ull) >> 32) & (table->capacity - 1);
}

static void place(struct registry_table *table, struct registry_slot slot)
{
    size_t i = home_of(table, slot.id);
    while (table->slots[i].id)
        i = (i + 1) & (table->capacity - 1);
    table->slots[i] = slot;
}

static int grow(struct registry_table *table)
{
    struct registry_table larger = *table;
    larger.capacity = table->capacity ? table->capacity * 2 : FIRST_CAPACITY;
    larger.slots = calloc(larger.capacity, sizeof(*larger.slots));
    if (!larger.slots)
        return 0;
    for (size_t i = 0; i < table->capacity; i++)
        if (table->slots[i].id)
            place(&larger, table->slots[i]);
    free(table->slots);
    *table = larger;
    return 1;
}

enum epd_status registry_add(struct registry *registry, enum registry_kind kind, uint64_t owner, void *object,
                             uint64_t *id, struct epd_error *error)
{
    struct registry_table *table = &registry->tables[kind];
    if (table->n_used * 2 >= table->capacity && !grow(table))
        return error_set(error, EPD_NO_MEMORY, "%s: no memory for entry %zu", kind_names[kind],
                         table->n_used + 1);
    *id = ++table->last_id;
    place(table, (struct registry_slot){*id, owner, object});
    table->n_used++;
    return EPD_OK;
}

static struct registry_slot *find_slot(const struct registry_table *table, uint64_t id)
{
    if (!table->capacity || !id)
        return NULL;
    for (size_t i = home_of(table, id); table->slots[i].id; i = (i + 1) & (table->capacity - 1))
        if (table->slots[i].id == id)
            return &table->slots[i];
    return NULL;
}

/* Backward shift: entries after the hole that could no longer be found move into it. */
static void close_hole(struct registry_table *table, size_t hole)
{
    const size_t mask = table->capacity - 1;
    for (size_t i = (hole + 1) & mask; table->slots[i].id; i = (i + 1) & mask) {
        size_t home = home_of(table, table->slots[i].id);
        if (((i - home) & mask) < ((i - hole) & mask))
            continue; /* its home lies after the hole */
        table->slots[hole] = table->slots[i];
        hole = i;
    }
    table->slots[hole] = (struct registry_slot){0};
}

void registry_remove(struct registry *registry, enum registry_kind kind, uint64_t id)
{
    struct registry_table *table = &registry->tables[kind];
    struct registry_slot *slot = find_slot(table, id);
    if (!slot)
        return;
    close_hole(table, (size_t)(slot - table->slots));
    table->n_used--;
}

void *registry_find(const struct registry *registry, enum registry_kind kind, uint64_t id)
{
    const struct registry_slot *slot = find_slot(&registry->tables[kind], id);
    return slot ? slot->object : NULL;
}

enum epd_status registry_find_owned(const struct registry *registry, enum registry_kind kind, uint64_t id,
                                    uint64_t owner, void **object, struct epd_error *error)
{
    const struct registry_slot *slot = find_slot(&registry->tables[kind], id);
    if (slot && slot->owner == owner) {
        *object = slot->object;
        return EPD_OK;
    }
    if (slot)
        return error_set(error, EPD_FOREIGN_ID, "%s %" PRIu64 " belongs to another session", kind_names[kind],
                         id);
    if (id && id <= registry->base)
        return error_set(error, EPD_STALE_EPOCH, "%s %" PRIu64 " is of an earlier worker", kind_names[kind],
                         id);
    return error_set(error, EPD_UNKNOWN_ID, "%s %" PRIu64 " does not exist", kind_names[kind], id);
}

size_t registry_count(const struct registry *registry, enum registry_kind kind)
{
    return registry->tables[kind].n_used;
}
