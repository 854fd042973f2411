/* Inside of the engine sm90: the body of its plans, for sm90.c (checks, launches) and sm90_maps.c (how the copy engine sees
 * the tensors). Lane thread. */
#ifndef EPD_KERNELS_GEMM_SM90_PLAN_H
#define EPD_KERNELS_GEMM_SM90_PLAN_H

#include <cuda.h>

#include "kernels/gemm/engine.h"
#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_config.h"

typedef CUresult (*encode_tiled_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Launches of one plan share its counters: they may follow each other on a stream, not run side by side. */
struct gemm_engine_plan {
    struct gemm_problem problem;
    struct sm90_config config;
    struct sm90_args args; /* what does not change between launches; maps of the last pointers */
    const void *mapped_a;
    const void *mapped_b;
    const void *mapped_c;
    const void *mapped_act;
    const void *mapped_preact;
    CUtensorMap *part_maps; /* owned, device, [n_groups]; NULL without pointer_parts */
    encode_tiled_fn encode;
};

static inline int is_gated(const struct gemm_problem *problem)
{
    return problem->activation && problem->shape.layout == EPD_GEMM_TN;
}

/* The product's d_act ends in the activation's backward. */
static inline int is_backward(const struct gemm_problem *problem)
{
    return problem->activation && problem->shape.layout == EPD_GEMM_NN;
}

/* The pre-activation of a gated product need not be kept. */
static inline int writes_c(const struct gemm_problem *problem)
{
    return !is_gated(problem) || problem->keep_preact;
}

/* sm90_maps.c */
EPD_MUST_CHECK enum epd_status sm90_maps_load(encode_tiled_fn *encode, struct epd_error *error);
/* Fill plan->args with maps of the launch's tensors; what the last launch had is not made again. */
EPD_MUST_CHECK enum epd_status sm90_map_inputs(struct gemm_engine_plan *plan,
                                               const struct gemm_launch *launch, struct epd_error *error);
EPD_MUST_CHECK enum epd_status sm90_map_outputs(struct gemm_engine_plan *plan,
                                                const struct gemm_launch *launch, struct epd_error *error);

#endif
