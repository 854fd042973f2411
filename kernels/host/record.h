/* Writing struct kernel_error. Kernels meet tokens and groups in rising order and stages run in order, so
 * "the first record stays" gives the same report in every run; a record that names a token goes before one
 * that names none. */
#ifndef EPD_KERNELS_HOST_RECORD_H
#define EPD_KERNELS_HOST_RECORD_H

#include "kernels/tensor.h"

static inline void record_keep_first(struct kernel_error *error, const struct kernel_error *seen)
{
    int names_earlier_token = seen->token >= 0 && (error->token < 0 || seen->token < error->token);
    if (error->status == 0 || names_earlier_token)
        *error = *seen;
}

#endif
