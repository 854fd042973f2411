/* Combine cut in two, where the rows of a token lie on several nodes: each node sums its own in fp32, in the order of k;
 * the token's rank adds the nodes' sums in the order of the nodes and rounds once. One thread. */
#ifndef EPD_KERNELS_HOST_PARTIAL_H
#define EPD_KERNELS_HOST_PARTIAL_H

#include "kernels/host/host.h"

/* sums[n_tokens, H] = sum over the (t, k) with row >= 0 of w[t, k] * y(t, k); zeros for a token without any. As
 * combine_args, but `out` tells the dtype of y only. */
EPD_MUST_CHECK enum epd_status host_combine_partial(const struct combine_args *args, float *sums,
                                                    struct host_scratch *scratch);

/* One node's sums. tokens[n]: rising; NULL: 0, 1, ... */
struct partial_sums {
    const float *sums; /* [n, H] */
    const int32_t *tokens;
    uint32_t n;
};

/* out[T, H] = the nodes' sums of each token, added in the order of `parts`; zeros for a token that has none. */
EPD_MUST_CHECK enum epd_status host_add_partials(const struct partial_sums *parts, uint32_t n_parts,
                                                 const struct tensor *out, struct host_scratch *scratch);

#endif
