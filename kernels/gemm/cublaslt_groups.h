/* Tables in device memory that cuBLASLt's grouped layouts (engine cublaslt_grouped) read: sizes and pointers of every group, made from m_splits by
 * a kernel ahead of the product. Lane thread; enqueues, allocates nothing. */
#ifndef EPD_KERNELS_GEMM_CUBLASLT_GROUPS_H
#define EPD_KERNELS_GEMM_CUBLASLT_GROUPS_H

#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

/* One operand as cuBLASLt sees it, column-major: [rows, cols] with leading dimension rows. */
struct cublaslt_operand {
    int32_t *rows, *cols; /* [L] device */
    void **data;          /* [L] device */
};

/* Device memory of a plan, one allocation. */
struct cublaslt_tables {
    struct cublaslt_operand a, b, c;
};

struct cublaslt_groups_args {
    struct gemm_args gemm;
    struct cublaslt_tables tables;
};

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of the tables of n_groups groups, and where they lie in `memory` (NULL: measured only). */
size_t cublaslt_tables_carve(struct cublaslt_tables *tables, uint32_t n_groups, void *memory);

/* Loads the kernels, so that the first launch loads nothing. */
cudaError_t cublaslt_groups_prepare(void);
/* Fills the tables; splits that leave the buffers are cut and recorded (struct row_groups). NT that overwrites: groups
 * without rows get zeros here, cuBLASLt passes over them. */
cudaError_t cublaslt_groups_launch(const struct cublaslt_groups_args *args, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
