/* What lies on a device beside what ought to. Used by one thread. */
#ifndef EPD_TESTS_GPU_EXCHANGE_COMPARE_H
#define EPD_TESTS_GPU_EXCHANGE_COMPARE_H

#include "tests/gpu/exchange/inputs.h"

/* Where a rank's inputs go on its device. */
struct input_places {
    void *topk_idx, *topk_weights, *x, *dout, *y;
};

/* topk_idx narrowed to what the problem says. */
void upload_input(const struct problem *problem, const struct rank_input *input,
                  const struct input_places *places);
/* Bytes. The first difference is printed; returns whether there is one. */
int same(const char *what, uint32_t rank, const void *device, const void *want, size_t bytes);
/* d_weights of a rank, accumulated `times` times: a sum over H in another order than ours, close and not equal. The first that is
 * not is printed; returns whether there is one. */
int check_dots(const struct problem *problem, const struct rank_input *input,
               const struct rank_expected *expected, uint32_t rank, const float *got, int times);

#endif
