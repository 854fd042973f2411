/* The group step of host_bias_grad (host.h), which the NT form of host_gemm shares for its dbias. */
#ifndef EPD_KERNELS_HOST_BIAS_GRAD_H
#define EPD_KERNELS_HOST_BIAS_GRAD_H

#include "kernels/host/groups.h"

/* dbias of one group; args->groups and args->error are not read. No rows: zeros, or nothing when
 * accumulating. */
void bias_grad_group(const struct bias_grad_args *args, const struct group_rows *rows);

#endif
