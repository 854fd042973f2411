/* Sizes of a workspace: one place, so that ranks and kernels agree. */
#include "kernels/cuda/cuda.h"

#include <assert.h>

static size_t rounded_up(size_t value, size_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* The offset of the next array, each on a cache line of its own. */
static size_t placed(size_t *end, size_t bytes)
{
    size_t at = *end;
    *end = rounded_up(at + bytes, 256);
    return at;
}

static size_t pieces_of(size_t row_bytes, size_t most_bytes)
{
    size_t pieces = (row_bytes + most_bytes - 1) / most_bytes;
    size_t piece_bytes = rounded_up((row_bytes + pieces - 1) / pieces, 128);
    return (row_bytes + piece_bytes - 1) / piece_bytes;
}

uint32_t cuda_row_pieces(size_t row_bytes)
{
    return (uint32_t)pieces_of(row_bytes, CUDA_PIECE_BYTES);
}

uint32_t cuda_exchange_blocks(const struct exchange_shape *shape, uint32_t n_multiprocessors)
{
    uint32_t blocks = shape->max_blocks;
    if (blocks == 0)
        blocks = shape->max_tokens <= CUDA_FEW_TOKENS ? CUDA_FEW_TOKENS_BLOCKS : CUDA_DEFAULT_BLOCKS;
    return blocks < n_multiprocessors ? blocks : n_multiprocessors;
}

void cuda_workspace_layout(const struct exchange_shape *shape, size_t row_bytes,
                           struct cuda_workspace *layout)
{
    size_t n_ranks = shape->world_size, n_tokens = shape->max_tokens;
    size_t slots = rounded_up(n_tokens * shape->top_k, 32);
    size_t arrivals = rounded_up(n_tokens * pieces_of(row_bytes, CUDA_SUM_PIECE_BYTES), 32);
    size_t end = 0;
    *layout = (struct cuda_workspace){
        .slot_stride = slots,
        .arrival_stride = arrivals,
        .stage_row_bytes = rounded_up(row_bytes, 128),
    };
    layout->state = placed(&end, 256);
    layout->abort = placed(&end, sizeof(uint32_t));
    layout->signals = placed(&end, 8 * EPD_MAX_RANKS * sizeof(uint32_t));
    layout->tokens = placed(&end, n_ranks * sizeof(int32_t));
    layout->counts = placed(&end, n_ranks * shape->n_experts * sizeof(int32_t));
    layout->slot_row = placed(&end, n_ranks * slots * sizeof(int32_t));
    layout->slot_weight = placed(&end, n_ranks * slots * sizeof(float));
    layout->scalars = placed(&end, slots * sizeof(float));
    layout->arrivals = placed(&end, n_ranks * arrivals * sizeof(uint32_t));
    layout->stage = placed(&end, (n_ranks - 1) * n_tokens * layout->stage_row_bytes);
    layout->bytes = end;
    assert(layout->abort == CUDA_ABORT_OFFSET);
}
