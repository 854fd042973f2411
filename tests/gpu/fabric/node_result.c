#include "tests/gpu/fabric/node_result.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PATH_BYTES 128
/* Slots hold the same bits on one node and on several, and so does all that is made of them; sums of tokens are rounded once
 * more for each node. */
#define BF16_UNIT (1.0 / 256)

size_t node_result_part(struct node_result *result, enum node_part part, unsigned world_size, void **data)
{
    const size_t n_local = NODE_E / world_size;
    switch (part) {
    case NODE_OUT:
        *data = result->out;
        return sizeof result->out;
    case NODE_DX:
        *data = result->dx;
        return sizeof result->dx;
    case NODE_D_WEIGHTS:
        *data = result->d_weights;
        return sizeof result->d_weights;
    case NODE_DW1:
        *data = result->dw1;
        return n_local * 2 * NODE_F * NODE_H * sizeof(float);
    case NODE_DW2:
        *data = result->dw2;
        return n_local * NODE_H * NODE_F * sizeof(float);
    case NODE_PARTS:
        break;
    }
    *data = NULL;
    return 0;
}

static FILE *open_file(const char *prefix, unsigned rank, const char *mode, char path[PATH_BYTES])
{
    (void)snprintf(path, PATH_BYTES, "%s.%u", prefix, rank);
    FILE *file = fopen(path, mode);
    if (!file)
        perror(path);
    return file;
}

int node_result_write(struct node_result *result, unsigned world_size, const char *prefix, unsigned rank)
{
    char path[PATH_BYTES];
    FILE *file = open_file(prefix, rank, "w", path);
    int failed = !file;
    for (int part = 0; part < NODE_PARTS && !failed; part++) {
        void *data;
        const size_t bytes = node_result_part(result, (enum node_part)part, world_size, &data);
        failed = fwrite(data, bytes, 1, file) != 1;
    }
    return (file && fclose(file) != 0) || failed;
}

int node_result_read(struct node_result *result, unsigned world_size, const char *prefix, unsigned rank)
{
    char path[PATH_BYTES];
    FILE *file = open_file(prefix, rank, "r", path);
    int failed = !file;
    for (int part = 0; part < NODE_PARTS && !failed; part++) {
        void *data;
        const size_t bytes = node_result_part(result, (enum node_part)part, world_size, &data);
        failed = fread(data, bytes, 1, file) != 1;
    }
    if (file)
        (void)fclose(file);
    return failed;
}

void node_results_remove(const char *prefix, unsigned world_size)
{
    char path[PATH_BYTES];
    for (unsigned rank = 0; rank < world_size; rank++) {
        (void)snprintf(path, sizeof path, "%s.%u", prefix, rank);
        (void)unlink(path);
    }
}

static float bf16_value(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static double value_at(const void *data, size_t i, int is_bf16)
{
    return is_bf16 ? bf16_value(((const uint16_t *)data)[i]) : ((const float *)data)[i];
}

/* The largest difference, as a part of the largest value; NaN counts as infinite. */
static double difference(const void *a, const void *b, size_t bytes, int is_bf16)
{
    double largest = 0, value = 0;
    for (size_t i = 0; i < bytes / (is_bf16 ? 2 : 4); i++) {
        const double x = value_at(a, i, is_bf16), y = value_at(b, i, is_bf16);
        if (!isfinite(x) || !isfinite(y))
            return INFINITY;
        largest = fmax(largest, fabs(x - y));
        value = fmax(value, fabs(x));
    }
    return value > 0 ? largest / value : INFINITY;
}

int node_results_compare(const char *one, const char *several, unsigned world_size, unsigned n_nodes)
{
    static const char *const names[NODE_PARTS] = {"out", "dx", "d_weights", "dw1", "dw2"};
    static struct node_result a, b;
    int failed = 0;
    for (unsigned rank = 0; rank < world_size; rank++) {
        if (node_result_read(&a, world_size, one, rank) | node_result_read(&b, world_size, several, rank))
            return 1;
        printf("rank %u of %u: one node against %u:", rank, world_size, n_nodes);
        for (int part = 0; part < NODE_PARTS; part++) {
            void *x, *y;
            const int is_bf16 = part == NODE_OUT || part == NODE_DX;
            const size_t bytes = node_result_part(&a, (enum node_part)part, world_size, &x);
            (void)node_result_part(&b, (enum node_part)part, world_size, &y);
            const double apart = difference(x, y, bytes, is_bf16);
            printf(" %s %.2e", names[part], apart);
            failed |= !(apart <= (is_bf16 ? (n_nodes + 1) * BF16_UNIT : 1e-5));
        }
        printf("\n");
    }
    return failed;
}
