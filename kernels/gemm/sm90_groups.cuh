/* The two warpgroups of a block that multiply (NT): a tile's products, in whose shadow the results of the tile before leave. */
#ifndef EPD_KERNELS_GEMM_SM90_GROUPS_CUH
#define EPD_KERNELS_GEMM_SM90_GROUPS_CUH

#include "kernels/gemm/sm90_products.cuh"

namespace sm90 {

/* What the products of a tile do in the shadow of their first steps. */
struct send_late {
    late_columns &late;
    const sm90_args &args;
    uint32_t stages;

    __device__ __forceinline__ void operator()() const
    {
        if (late.n_left)
            late.step(args, place_now(args, stages));
    }
};

/* All eight columns of the product with ones are the same: the first lane of four stores. */
__device__ __forceinline__ void store_dbias(const sm90_args &args, const epilogue_place &at, int group,
                                            float low, float high)
{
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t outer = at.outer_first + at.warp * 16 + i * 8 + (at.lane >> 2);
        if ((at.lane & 3) != 0 || outer >= args.outer)
            continue;
        size_t element = static_cast<size_t>(group) * args.outer + outer;
        float old = args.accumulate ? load_any(args.dbias, args.dtype_bias, element) : 0.0f;
        store_any(args.dbias, args.dtype_bias, element, old + (i ? high : low));
    }
}

/* The matrix of the tile's group. */
__device__ __forceinline__ void *group_matrix(const sm90_args &args, int group)
{
    size_t group_bytes = static_cast<size_t>(args.outer) * args.inner * (args.dtype_c == EPD_F32 ? 4 : 2);
    return args.c_parts ? args.c_parts[group] : static_cast<uint8_t *>(args.c_data) + group * group_bytes;
}

template <class Op>
__device__ __forceinline__ void finish_columns(const sm90_args &args, epilogue_place &at, const tile &now,
                                               float (&d)[128], late_columns &late)
{
    uint32_t inner_first = (now.place >> 16) * args.tile_inner;
    const CUtensorMap *map = args.c_parts_map ? args.c_parts_map + now.group : &args.c;
    int group = args.c_parts_map ? 0 : now.group;
    if (args.c_parts_map)
        acquire_map(map);
    if (args.dtype_c == EPD_F32)
        store_columns_f32(args, at, map, group, inner_first, d);
    else if (args.accumulate && args.dtype_c == EPD_F16)
        add_columns<true>(args, at, group_matrix(args, now.group), inner_first, d);
    else if (args.accumulate)
        add_columns<false>(args, at, group_matrix(args, now.group), inner_first, d);
    else if (args.dtype_c == EPD_F16)
        late.keep<true>(at, now.group, inner_first, d);
    else
        late.keep<false>(at, now.group, inner_first, d);
}

template <class Op> __device__ __forceinline__ epilogue_place place_of(const consumer &with, const tile &now)
{
    epilogue_place at = place_now(with.args, with.stages);
    uint32_t outer_tile = (now.place & 0xffff) * 2 + cluster_rank();
    at.outer_first = outer_tile * SM90_OUTER_ROWS + (at.barrier - 1) * 64;
    at.row = now.row;
    at.rows = now.rows;
    return at;
}

/* One tile of NT; the tile after the last column is the sum of dY's rows. */
template <class Op>
__device__ __forceinline__ void finish_group(consumer &with, const tile &now, float (&d)[128],
                                             late_columns &late)
{
    const sm90_args &args = with.args;
    send_late step = {late, args, with.stages};
    uint32_t inner_first = (now.place >> 16) * args.tile_inner;
    if (inner_first >= args.inner) {
        with.multiply<Op, 8, true>(now.rows, d, step);
        store_dbias(args, place_of<Op>(with, now), now.group, now.rows ? d[0] : 0.0f, now.rows ? d[2] : 0.0f);
    } else if (now.rows == 0) {
        store_zeros(args, place_of<Op>(with, now), group_matrix(args, now.group), inner_first);
    } else {
        multiply_columns<Op>(with, now.rows, d, step);
        step();
        step();
        epilogue_place at = place_of<Op>(with, now);
        finish_columns<Op>(args, at, now, d, late);
    }
}

template <class Op>
__device__ __forceinline__ void consume_groups(const sm90_args &args, const shared_layout &shared)
{
    consumer with(args, shared);
    lean_reader tiles(shared.box);
    late_columns late;
    while (true) {
        tile now = tiles.wait();
        uint32_t loaded = __reduce_and_sync(~0u, static_cast<uint32_t>(now.group));
        if (with.lane == 0)
            tiles.release(loaded);
        tiles.advance();
        if (now.group < 0)
            break;
        float d[128];
        finish_group<Op>(with, now, d, late);
    }
    send_late rest = {late, args, with.stages};
    rest();
    rest();
    store_wait_read<0>();
}

} // namespace sm90

#endif
