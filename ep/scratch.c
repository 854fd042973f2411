#include "ep/scratch.h"

#include <assert.h>

static uint64_t region_bytes(const struct backend *backend, const struct problem *problem,
                             enum scratch_region region)
{
    const struct exchange_shape shape = problem_shape(problem);
    struct exchange_sizes sizes;
    backend->exchange_sizes(&shape, problem->hidden * dtype_bytes(problem->dtype), &sizes);
    switch (region) {
    case SCRATCH_SLOTS:
    case SCRATCH_DOUT:
    case SCRATCH_Y:
        return problem_row_bytes(problem, problem->hidden);
    case SCRATCH_PREACT:
        return problem_row_bytes(problem, 2 * (uint64_t)problem->ffn);
    case SCRATCH_ACT:
        return problem_row_bytes(problem, problem->ffn);
    case SCRATCH_ROW_SCALARS:
        return (uint64_t)problem->capacity_rows * sizeof(float);
    case SCRATCH_WORKSPACE:
        return sizes.workspace_bytes;
    case SCRATCH_DOT:
        return sizes.dot_bytes;
    case SCRATCH_REGION_COUNT:
        break;
    }
    assert(!"a region");
    return 0;
}

enum epd_status scratch_acquire(struct scratch *scratch, struct heap *heap, const struct problem *problem,
                                enum scratch_region region, void **data, uint64_t *added_bytes,
                                struct epd_error *error)
{
    struct backend_block *block = &scratch->regions[region];
    uint64_t added = 0;
    uint64_t bytes = region_bytes(heap->backend, problem, region);
    if (!block->data && bytes) {
        if (heap_alloc(heap, bytes, 0, block, error))
            return error->status;
        added = block->bytes;
    }
    *data = block->data;
    *added_bytes = added;
    return EPD_OK;
}

void scratch_fini(struct scratch *scratch, struct heap *heap)
{
    for (int i = 0; i < SCRATCH_REGION_COUNT; i++)
        heap_free(heap, &scratch->regions[i]);
}
