/* Grouped GEMM on a CBLAS library, one group after another.
 *
 * fp32 goes to cblas_sgemm as it lies. bf16 and f16 operands are converted block by block through scratch,
 * and a result that is not fp32 is made in an fp32 tile and rounded once. beta = 0 means that C is not read,
 * so garbage in it (a NaN) does not leak.
 *
 * Several lanes call this at once: the library must run single-threaded inside each call. For OpenBLAS the
 * host backend (ep) calls openblas_set_num_threads(1) once, before its first lane starts; a program that uses
 * these kernels alone does the same. One thread also makes the order of every sum, and so the bits of the
 * result, always the same. */
#include <assert.h>
#include <cblas.h>
#include <string.h>

#include "kernels/host/bias_grad.h"
#include "kernels/host/dtype.h"
#include "kernels/host/scratch.h"

/* Blocks of a conversion: rows of the activations, and rows (N) of the weights or of dW. A converted element
 * of the weights serves M_BLOCK rows: some hundred multiplications for one conversion. */
#define M_BLOCK 512
#define N_BLOCK 256
/* Without conversions the limit is only the int that CBLAS counts in. */
#define M_BLOCK_PLAIN (1 << 24)

/* One call: the block sizes and the parts of scratch. */
struct gemm_work {
    const struct gemm_args *args;
    int64_t m_block;
    size_t n_block;
    float *a, *b, *tile, *bias;
};

/* A row-major fp32 matrix with the distance of its rows. */
struct block {
    const float *data;
    size_t ld;
};

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static const void *element_at(const void *base, size_t idx, enum epd_dtype dtype)
{
    return (const char *)base + idx * dtype_bytes(dtype);
}

/* Rows x columns of a matrix of dtype `dtype` with rows `ld` apart, beginning at its element `idx`. */
static struct block load_block(const struct gemm_work *work, const void *base, size_t idx, size_t ld,
                               size_t n_rows, size_t n_columns, float *buffer)
{
    enum epd_dtype dtype = work->args->shape.dtype;
    if (dtype == EPD_F32)
        return (struct block){.data = (const float *)base + idx, .ld = ld};
    for (size_t row = 0; row < n_rows; row++)
        dtype_load(buffer + row * n_columns, element_at(base, idx + row * ld, dtype), dtype, n_columns);
    return (struct block){.data = buffer, .ld = n_columns};
}

static void store_tile(const struct gemm_work *work, void *base, size_t idx, size_t ld, size_t n_rows,
                       size_t n_columns)
{
    enum epd_dtype dtype = work->args->shape.dtype_c;
    for (size_t row = 0; row < n_rows; row++)
        dtype_store((void *)element_at(base, idx + row * ld, dtype), work->tile + row * n_columns, dtype,
                    n_columns);
}

static int c_is_fp32(const struct gemm_work *work)
{
    return work->args->shape.dtype_c == EPD_F32;
}

static const void *group_weights(const struct gemm_args *args, uint32_t group_idx)
{
    if (args->b_parts)
        return args->b_parts[group_idx];
    return element_at(args->b, (size_t)group_idx * args->shape.n * args->shape.k, args->shape.dtype);
}

/* Y block [m, n] = X W^T (+ bias): the bias goes into C first and the product is added to it. */
static void tn_block(const struct gemm_work *work, const struct block *x, size_t m, const void *weights,
                     size_t n0, size_t n, float *c, size_t ldc)
{
    size_t k = work->args->shape.k;
    struct block w = load_block(work, weights, n0 * k, k, n, k, work->b);
    if (work->args->bias)
        for (size_t row = 0; row < m; row++)
            memcpy(c + row * ldc, work->bias + n0, n * sizeof(float));
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, 1.0f, x->data, (int)x->ld,
                w.data, (int)w.ld, work->args->bias ? 1.0f : 0.0f, c, (int)ldc);
}

static void tn_group(const struct gemm_work *work, const struct group_rows *rows)
{
    const struct gemm_args *args = work->args;
    size_t n_total = args->shape.n, k = args->shape.k;
    const void *weights = group_weights(args, rows->group_idx);
    if (args->bias) {
        enum epd_dtype dtype = args->shape.dtype_bias;
        dtype_load(work->bias, element_at(args->bias, rows->group_idx * n_total, dtype), dtype, n_total);
    }
    for (int64_t done = 0; done < rows->n_rows; done += work->m_block) {
        size_t first = (size_t)(rows->first_row + done);
        size_t m = min_size((size_t)(rows->n_rows - done), (size_t)work->m_block);
        struct block x = load_block(work, args->a, first * k, k, m, k, work->a);
        for (size_t n0 = 0; n0 < n_total; n0 += work->n_block) {
            size_t n = min_size(n_total - n0, work->n_block), at = first * n_total + n0;
            if (c_is_fp32(work)) {
                tn_block(work, &x, m, weights, n0, n, (float *)args->c + at, n_total);
            } else {
                tn_block(work, &x, m, weights, n0, n, work->tile, n);
                store_tile(work, args->c, at, n_total, m, n);
            }
        }
    }
}

/* dX block [m, K] = dY W, summed over blocks of N. */
static void nn_rows(const struct gemm_work *work, const void *weights, size_t first, size_t m)
{
    const struct gemm_args *args = work->args;
    size_t n_total = args->shape.n, k = args->shape.k;
    float *c = c_is_fp32(work) ? (float *)args->c + first * k : work->tile;
    for (size_t n0 = 0; n0 < n_total; n0 += work->n_block) {
        size_t n = min_size(n_total - n0, work->n_block);
        struct block dy = load_block(work, args->a, first * n_total + n0, n_total, m, n, work->a);
        struct block w = load_block(work, weights, n0 * k, k, n, k, work->b);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)m, (int)k, (int)n, 1.0f, dy.data,
                    (int)dy.ld, w.data, (int)w.ld, n0 > 0 ? 1.0f : 0.0f, c, (int)k);
    }
    if (!c_is_fp32(work))
        store_tile(work, args->c, first * k, k, m, k);
}

static void nn_group(const struct gemm_work *work, const struct group_rows *rows)
{
    const void *weights = group_weights(work->args, rows->group_idx);
    for (int64_t done = 0; done < rows->n_rows; done += work->m_block)
        nn_rows(work, weights, (size_t)(rows->first_row + done),
                min_size((size_t)(rows->n_rows - done), (size_t)work->m_block));
}

/* dW block [n, K] = dY^T X over all rows of the group, into c (fp32). */
static void nt_block(const struct gemm_work *work, const struct group_rows *rows, size_t n0, size_t n,
                     float *c, int add_to_c)
{
    const struct gemm_args *args = work->args;
    size_t n_total = args->shape.n, k = args->shape.k;
    for (int64_t done = 0; done < rows->n_rows; done += work->m_block) {
        size_t first = (size_t)(rows->first_row + done);
        size_t m = min_size((size_t)(rows->n_rows - done), (size_t)work->m_block);
        struct block dy = load_block(work, args->a, first * n_total + n0, n_total, m, n, work->a);
        struct block x = load_block(work, args->b, first * k, k, m, k, work->b);
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)n, (int)k, (int)m, 1.0f, dy.data,
                    (int)dy.ld, x.data, (int)x.ld, done > 0 || add_to_c ? 1.0f : 0.0f, c, (int)k);
    }
}

/* Adds what c holds to the tile: the sum is rounded once, when the tile is stored. */
static void add_old_values(const struct gemm_work *work, const void *c, size_t idx, size_t n_values)
{
    float old[N_BLOCK];
    enum epd_dtype dtype = work->args->shape.dtype_c;
    for (size_t i = 0; i < n_values; i += N_BLOCK) {
        size_t n = min_size(n_values - i, N_BLOCK);
        dtype_load(old, element_at(c, idx + i, dtype), dtype, n);
        for (size_t j = 0; j < n; j++)
            work->tile[i + j] += old[j];
    }
}

static void nt_dbias(const struct gemm_args *args, const struct group_rows *rows)
{
    struct bias_grad_args bias_args = {
        .dtype = args->shape.dtype,
        .dtype_dbias = args->shape.dtype_bias,
        .n = args->shape.n,
        .dy = args->a,
        .dbias = args->dbias,
        .accumulate = args->shape.accumulate,
    };
    bias_grad_group(&bias_args, rows);
}

static void nt_group(const struct gemm_work *work, const struct group_rows *rows)
{
    const struct gemm_args *args = work->args;
    size_t n_total = args->shape.n, k = args->shape.k;
    enum epd_dtype dtype_c = args->shape.dtype_c;
    void *c = args->c_parts ? args->c_parts[rows->group_idx]
                            : (void *)element_at(args->c, rows->group_idx * n_total * k, dtype_c);
    if (rows->n_rows == 0 && args->shape.accumulate)
        return;
    if (args->dbias)
        nt_dbias(args, rows);
    if (rows->n_rows == 0) {
        memset(c, 0, n_total * k * dtype_bytes(dtype_c));
        return;
    }
    for (size_t n0 = 0; n0 < n_total; n0 += work->n_block) {
        size_t n = min_size(n_total - n0, work->n_block);
        if (c_is_fp32(work)) {
            nt_block(work, rows, n0, n, (float *)c + n0 * k, args->shape.accumulate);
            continue;
        }
        nt_block(work, rows, n0, n, work->tile, 0);
        if (args->shape.accumulate)
            add_old_values(work, c, n0 * k, n * k);
        store_tile(work, c, n0 * k, k, n, k);
    }
}

/* Chooses the blocks and takes scratch for what is not fp32 already. */
static enum epd_status prepare(struct gemm_work *work, struct host_scratch *scratch)
{
    const struct gemm_shape *shape = &work->args->shape;
    int plain = shape->dtype == EPD_F32 && shape->dtype_c == EPD_F32;
    size_t n = shape->n, k = shape->k;
    work->m_block = plain ? M_BLOCK_PLAIN : M_BLOCK;
    work->n_block = plain ? n : min_size(n, N_BLOCK);

    size_t m = min_size(M_BLOCK, (size_t)work->args->groups.max_rows), nb = work->n_block;
    size_t a = 0, b = 0, tile = 0, bias = work->args->bias ? n : 0;
    if (shape->dtype != EPD_F32) {
        a = m * (shape->layout == EPD_GEMM_TN ? k : nb);
        b = k * (shape->layout == EPD_GEMM_NT ? m : nb);
    }
    if (shape->dtype_c != EPD_F32)
        tile = shape->layout == EPD_GEMM_TN ? m * nb : shape->layout == EPD_GEMM_NN ? m * k : nb * k;
    float *floats;
    enum epd_status status = host_scratch_acquire(scratch, a + b + tile + bias, &floats);
    if (status != EPD_OK)
        return status;
    work->a = floats;
    work->b = work->a + a;
    work->tile = work->b + b;
    work->bias = work->tile + tile;
    return EPD_OK;
}

enum epd_status host_gemm(const struct gemm_args *args, struct host_scratch *scratch)
{
    struct gemm_work work = {.args = args};
    enum epd_status status = prepare(&work, scratch);
    if (status != EPD_OK)
        return status;
    struct group_cursor cursor;
    struct group_rows rows;
    group_cursor_init(&cursor, &args->groups, args->error);
    while (group_cursor_next(&cursor, &rows)) {
        if (args->shape.layout == EPD_GEMM_NT)
            nt_group(&work, &rows);
        else if (rows.n_rows == 0)
            continue;
        else if (args->shape.layout == EPD_GEMM_TN)
            tn_group(&work, &rows);
        else
            nn_group(&work, &rows);
    }
    return EPD_OK;
}
