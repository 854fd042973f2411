#include "tests/gpu/exchange/compare.h"

#include <math.h>
#include <string.h>

void upload_input(const struct problem *problem, const struct rank_input *input,
                  const struct input_places *places)
{
    size_t slots = (size_t)problem->max_tokens * problem->top_k,
           row_bytes = problem->hidden * dtype_bytes(problem->dtype);
    int32_t *narrow = malloc(slots * 4 + 4);
    for (size_t i = 0; i < slots; i++)
        narrow[i] = (int32_t)input->topk_idx[i];
    if (problem->idx_dtype == EPD_I64)
        upload(places->topk_idx, input->topk_idx, slots * 8);
    else
        upload(places->topk_idx, narrow, slots * 4);
    upload(places->topk_weights, input->topk_weights, slots * 4);
    upload(places->x, input->x, problem->max_tokens * row_bytes);
    upload(places->dout, input->dout, problem->max_tokens * row_bytes);
    upload(places->y, input->y, (size_t)problem->capacity_rows * row_bytes);
    free(narrow);
}

int same(const char *what, uint32_t rank, const void *device, const void *want, size_t bytes)
{
    unsigned char *got = malloc(bytes + 1);
    download(got, device, bytes);
    int failed = memcmp(got, want, bytes) != 0;
    for (size_t i = 0; failed && i < bytes; i++) {
        if (got[i] == ((const unsigned char *)want)[i])
            continue;
        uint32_t g = 0, w = 0;
        size_t at = i & ~(size_t)3, n = bytes - at < 4 ? bytes - at : 4;
        memcpy(&g, got + at, n);
        memcpy(&w, (const unsigned char *)want + at, n);
        printf("  FAIL %s rank %u byte %zu of %zu: got %08x, want %08x\n", what, rank, i, bytes, g, w);
        break;
    }
    free(got);
    return failed;
}

int check_dots(const struct problem *problem, const struct rank_input *input,
               const struct rank_expected *expected, uint32_t rank, const float *got, int times)
{
    size_t n_local = problem->n_experts / problem->n_ranks;
    for (size_t i = 0; i < (size_t)problem->n_tokens[rank] * problem->top_k; i++) {
        double want = 0.0, size = 0.0;
        int32_t row = expected[rank].row[i];
        for (uint32_t h = 0; row >= 0 && h < problem->hidden; h++) {
            size_t at = (size_t)expected[rank].expert[i] / n_local;
            double term = (double)element_get(input[rank].dout, i / problem->top_k * problem->hidden + h,
                                              problem->dtype) *
                          element_get(input[at].y, (size_t)row * problem->hidden + h, problem->dtype);
            want += term * times;
            size += fabs(term) * times;
        }
        if (!(fabs(got[i] - want) <= 1e-5 * size))
            return printf("  FAIL d_weights rank %u slot %zu: got %g, want %g\n", rank, i, got[i], want), 1;
    }
    return 0;
}
