/* Column sums of weighted rows, summed in double in the order of the rows: one rounding, whatever their
 * number. */
#include "kernels/host/bias_grad.h"

#include "kernels/host/dtype.h"
#include "kernels/host/host.h"

#define BIAS_BLOCK 256

static void add_rows(const struct bias_grad_args *args, const struct group_rows *rows, size_t column,
                     size_t n, double *sums)
{
    float buffer[BIAS_BLOCK];
    for (int64_t row = rows->first_row; row < rows->first_row + rows->n_rows; row++) {
        size_t at = (size_t)row * args->n + column;
        const char *dy = (const char *)args->dy + at * dtype_bytes(args->dtype);
        const float *values = dtype_view(dy, args->dtype, n, buffer);
        double weight = args->row_weights ? args->row_weights[row] : 1.0;
        for (size_t i = 0; i < n; i++)
            sums[i] += weight * values[i];
    }
}

static void bias_block(const struct bias_grad_args *args, const struct group_rows *rows, size_t column)
{
    size_t n = args->n - column < BIAS_BLOCK ? args->n - column : BIAS_BLOCK;
    size_t at = (size_t)rows->group_idx * args->n + column;
    char *dbias = (char *)args->dbias + at * dtype_bytes(args->dtype_dbias);
    double sums[BIAS_BLOCK] = {0};
    float buffer[BIAS_BLOCK];
    add_rows(args, rows, column, n, sums);
    if (args->accumulate) {
        dtype_load(buffer, dbias, args->dtype_dbias, n);
        for (size_t i = 0; i < n; i++)
            sums[i] += buffer[i];
    }
    for (size_t i = 0; i < n; i++)
        buffer[i] = (float)sums[i];
    dtype_store(dbias, buffer, args->dtype_dbias, n);
}

void bias_grad_group(const struct bias_grad_args *args, const struct group_rows *rows)
{
    if (rows->n_rows == 0 && args->accumulate)
        return;
    for (size_t column = 0; column < args->n; column += BIAS_BLOCK)
        bias_block(args, rows, column);
}

enum epd_status host_bias_grad(const struct bias_grad_args *args)
{
    struct group_cursor cursor;
    struct group_rows rows;
    group_cursor_init(&cursor, &args->groups, args->error);
    while (group_cursor_next(&cursor, &rows))
        bias_grad_group(args, &rows);
    return EPD_OK;
}
