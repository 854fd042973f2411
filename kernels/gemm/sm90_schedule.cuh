/* Which tile comes next: one warp of each cluster turns a running tile number into (group, rows, place), reading
 * m_splits and offsets from device memory, and posts it to both blocks. Numbers are handed out by a counter in device
 * memory, so clusters that got short tiles take more of them; a tile's result does not depend on who computes it.
 *
 * Tiles are numbered group by group; within a group in bands of 8 inner tiles, outer tiles outward, inner tiles of the
 * band fastest: the clusters at work at one time then share few rows of either operand, which stay in the L2.
 * A group of m rows is cut into ceil(m / tile_inner) nearly equal tiles (multiples of 8 rows), not into full ones and a
 * rest: a short tile reads as many weights as a full one. */
#ifndef EPD_KERNELS_GEMM_SM90_SCHEDULE_CUH
#define EPD_KERNELS_GEMM_SM90_SCHEDULE_CUH

#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_ptx.cuh"

namespace sm90 {

/* As it travels through shared memory (16 bytes). */
struct tile {
    int group; /* -1: no more tiles */
    int row;   /* first token row of the tile (TN, NN) or of the group (NT) */
    int rows;  /* token rows of the tile (TN, NN) or of the group (NT) */
    int place; /* outer tile of the cluster (256 rows) | inner tile << 16 (NT) */
};

constexpr int BAND = 8;

__device__ __forceinline__ uint32_t div_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

/* The groups are looked at 32 at a time, one per lane; tile numbers only grow, so the window only moves forward. */
template <bool TOKENS_INNER> struct scheduler {
    const sm90_args &args;
    uint32_t lane;
    uint32_t outer_tiles, inner_tiles; /* inner_tiles: NT only, one more for dbias */
    int first_group;                   /* of the window */
    uint32_t tiles_before;             /* tiles of all groups before the window */
    int64_t rows_before;               /* rows of all groups before the window, for packed groups */
    uint32_t m, row, last_tile; /* of this lane's group; last_tile = tiles up to and with it, in the window */
    bool records;

    __device__ scheduler(const sm90_args &args_, bool records_) : args(args_), records(records_)
    {
        lane = threadIdx.x & 31;
        outer_tiles = div_up(args.outer, 2 * SM90_OUTER_ROWS);
        inner_tiles = TOKENS_INNER ? 0 : div_up(args.inner, args.tile_inner) + (args.dbias != nullptr);
        first_group = 0;
        tiles_before = 0;
        rows_before = 0;
        load_window();
    }

    __device__ uint32_t inner_count(uint32_t rows) const
    {
        return div_up(rows, args.tile_inner);
    }

    __device__ uint32_t inner_height(uint32_t rows) const
    {
        uint32_t count = inner_count(rows);
        return count ? (div_up(rows, count) + 7) & ~7u : 8;
    }

    /* Splits are other people's data: whatever they say, rows stay inside [0, max_rows). */
    __device__ void load_window()
    {
        int group = first_group + static_cast<int>(lane);
        bool valid = group < static_cast<int>(args.n_groups);
        int64_t got = valid ? args.m_splits[group] : 0;
        int64_t rows = got < 0 ? 0 : got > args.max_rows ? args.max_rows : got;
        int64_t start = rows;
        for (int step = 1; step < 32; step *= 2) {
            int64_t left = __shfl_up_sync(~0u, start, step);
            start += lane >= step ? left : 0;
        }
        int64_t window_rows = __shfl_sync(~0u, start, 31);
        start = rows_before + start - rows;
        rows_before += window_rows;
        if (args.offsets && valid)
            start = args.offsets[group];
        bool inside = start >= 0 && start <= args.max_rows;
        int64_t room = inside ? args.max_rows - start : 0;
        m = static_cast<uint32_t>(rows < room ? rows : room);
        row = inside ? static_cast<uint32_t>(start) : 0;
        uint32_t wrong = __ballot_sync(~0u, valid && got != m);
        if (records && wrong != 0 && lane == __ffs(wrong) - 1)
            record(group, got, room);
        uint32_t tiles = 0;
        if (valid && TOKENS_INNER)
            tiles = m ? div_up(m, inner_height(m)) * outer_tiles : 0;
        else if (valid)
            tiles = m == 0 && args.accumulate ? 0 : outer_tiles * inner_tiles;
        last_tile = tiles;
        for (int step = 1; step < 32; step *= 2) {
            uint32_t left = __shfl_up_sync(~0u, last_tile, step);
            last_tile += lane >= step ? left : 0;
        }
    }

    /* The first group that is wrong is kept: windows are visited in order. */
    __device__ void record(int group, int64_t got, int64_t allowed) const
    {
        struct kernel_error *error = args.error;
        if (!error || atomicCAS(&error->status, 0u, static_cast<uint32_t>(EPD_BAD_SPLITS)) != 0)
            return;
        error->expert = group;
        error->token = -1;
        error->got = got;
        error->allowed = allowed;
    }

    __device__ tile find(uint32_t number)
    {
        while (true) {
            uint32_t window_tiles = __shfl_sync(~0u, last_tile, 31);
            if (number - tiles_before < window_tiles)
                break;
            tiles_before += window_tiles;
            first_group += 32;
            if (first_group >= static_cast<int>(args.n_groups))
                return {-1, 0, 0, 0};
            load_window();
        }
        uint32_t local = number - tiles_before;
        int owner = __popc(__ballot_sync(~0u, last_tile <= local));
        uint32_t before = __shfl_sync(~0u, last_tile, owner > 0 ? owner - 1 : 0);
        local -= owner > 0 ? before : 0;
        uint32_t rows = __shfl_sync(~0u, m, owner);
        uint32_t start = __shfl_sync(~0u, row, owner);
        return place(first_group + owner, rows, start, local);
    }

    __device__ tile place(int group, uint32_t rows, uint32_t start, uint32_t local) const
    {
        uint32_t height = inner_height(rows);
        uint32_t count = TOKENS_INNER ? div_up(rows, height) : inner_tiles;
        uint32_t band = local / (BAND * outer_tiles);
        local -= band * BAND * outer_tiles;
        uint32_t width = min(count - band * BAND, static_cast<uint32_t>(BAND));
        uint32_t outer_idx = local / width, inner_idx = band * BAND + local % width;
        if (!TOKENS_INNER)
            return {group, static_cast<int>(start), static_cast<int>(rows),
                    static_cast<int>(outer_idx | inner_idx << 16)};
        uint32_t skipped = inner_idx * height;
        return {group, static_cast<int>(start + skipped), static_cast<int>(min(height, rows - skipped)),
                static_cast<int>(outer_idx)};
    }
};

} // namespace sm90

#endif
