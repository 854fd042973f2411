/* Host kernels: plain C and a CBLAS library, one thread (the lane) per call. They are the oracle every other
 * backend is tested against, so they favour being evidently right; contracts are in kernels/kernels.h. All
 * return EPD_OK or EPD_NO_MEMORY (scratch); bad input data is clamped and recorded in args->error, never
 * fatal. */
#ifndef EPD_KERNELS_HOST_HOST_H
#define EPD_KERNELS_HOST_HOST_H

#include "kernels/kernels.h"

/* Scratch of one lane, grown on demand and reused, so that a step allocates nothing once warm. Owned by the
 * lane. */
struct host_scratch {
    void *data;
    size_t bytes;
};
void host_scratch_fini(struct host_scratch *scratch);

EPD_MUST_CHECK enum epd_status host_route_count(const struct route_args *args, struct host_scratch *scratch);
/* The first half of host_route_count, for a rank alone: routing.expert and counts [E]; args->counts is not used. Any
 * number of ranks. */
void host_route_check(const struct route_args *args, int32_t *counts);
/* The receiver's half of host_route_layout, where the rows of this rank's experts are known: rows [L], of all ranks. Any
 * number of ranks. */
void host_route_slabs(const struct route_args *args, const int64_t *rows);
EPD_MUST_CHECK enum epd_status host_route_layout(const struct route_args *args, struct host_scratch *scratch);
EPD_MUST_CHECK enum epd_status host_dispatch_push(const struct dispatch_args *args,
                                                  struct host_scratch *scratch);
EPD_MUST_CHECK enum epd_status host_combine(const struct combine_args *args, struct host_scratch *scratch);
EPD_MUST_CHECK enum epd_status host_gather_scalars(const struct gather_scalars_args *args);
EPD_MUST_CHECK enum epd_status host_weight_grad(const struct weight_grad_args *args);
EPD_MUST_CHECK enum epd_status host_activation(const struct activation_args *args);
EPD_MUST_CHECK enum epd_status host_activation_bwd(const struct activation_bwd_args *args);
EPD_MUST_CHECK enum epd_status host_bias_grad(const struct bias_grad_args *args);
EPD_MUST_CHECK enum epd_status host_gemm(const struct gemm_args *args, struct host_scratch *scratch);

#endif
