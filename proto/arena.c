#include "proto/arena.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>

#define ARENA_ALIGNMENT ((size_t)16)

enum epd_status arena_init(struct arena *arena, size_t max_bytes)
{
    assert(max_bytes > 0);
    size_t size = (max_bytes + ARENA_ALIGNMENT - 1) & ~(ARENA_ALIGNMENT - 1);
    /* Fresh anonymous pages are zero, as the arena promises, and cost nothing until touched. */
    void *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
        return EPD_NO_MEMORY;
    *arena = (struct arena){.data = data, .size = size};
    return EPD_OK;
}

void arena_fini(struct arena *arena)
{
    if (arena->data)
        munmap(arena->data, arena->size);
    *arena = (struct arena){0};
}

void *arena_alloc(struct arena *arena, size_t bytes)
{
    size_t left = arena->size - arena->used;

    if (bytes > left) {
        arena->exhausted = 1;
        return NULL;
    }
    /* size is a multiple of the alignment, so what is left is too and the rounded size still fits. */
    void *memory = arena->data + arena->used;
    arena->used += (bytes + ARENA_ALIGNMENT - 1) & ~(ARENA_ALIGNMENT - 1);
    if (arena->used > arena->peak)
        arena->peak = arena->used;
    return memory;
}

void arena_reset(struct arena *arena)
{
    memset(arena->data, 0, arena->used);
    arena->used = 0;
    arena->exhausted = 0;
}
