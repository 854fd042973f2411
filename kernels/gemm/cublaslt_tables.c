#include "kernels/gemm/cublaslt_groups.h"

static void *take(char **next, size_t bytes)
{
    void *at = *next;
    *next = *next ? *next + bytes : NULL;
    return at;
}

size_t cublaslt_tables_carve(struct cublaslt_tables *tables, uint32_t n_groups, void *memory)
{
    struct cublaslt_operand *operands[] = {&tables->a, &tables->b, &tables->c};
    size_t n = ((size_t)n_groups + 3) / 4 * 4; /* 16-byte aligned whatever comes before */
    char *next = memory;
    for (int i = 0; i < 3; i++) {
        operands[i]->data = take(&next, n * sizeof(void *));
        operands[i]->rows = take(&next, n * sizeof(int32_t));
        operands[i]->cols = take(&next, n * sizeof(int32_t));
    }
    return 3 * n * (sizeof(void *) + 2 * sizeof(int32_t));
}
