#include "tests/gpu/exchange/reference.h"

#include <math.h>
#include <string.h>

static void check_token(const struct problem *p, const struct rank_input *input,
                        struct rank_expected *expected, uint32_t rank, uint32_t token)
{
    struct rank_expected *mine = &expected[rank];
    for (uint32_t k = 0; k < p->top_k; k++) {
        size_t i = (size_t)token * p->top_k + k;
        int64_t value = input[rank].topk_idx[i];
        int range = value >= 0 && value < p->n_experts, again = 0;
        for (uint32_t j = 0; j < k; j++)
            again |= range && input[rank].topk_idx[(size_t)token * p->top_k + j] == value;
        mine->expert[i] = range && !again ? (int32_t)value : -1;
        if (value != -1 && (!range || again) && mine->error.status == 0)
            mine->error = (struct kernel_error){
                .status = EPD_BAD_ROUTING,
                .rank = rank,
                .expert = range ? (int32_t)value : -1,
                .token = (int32_t)token,
                .got = value,
                .allowed = (int64_t)p->n_experts - 1,
            };
        for (uint32_t to = 0; mine->expert[i] >= 0 && to < p->n_ranks; to++)
            expected[to].counts[(size_t)rank * p->n_experts + (size_t)mine->expert[i]]++;
    }
}

/* Rows of the slabs of `rank`, in order: by expert, source, token. */
static void fill_slabs(const struct problem *p, struct rank_expected *expected, uint32_t rank)
{
    struct rank_expected *mine = &expected[rank];
    uint32_t n_local = p->n_experts / p->n_ranks;
    int64_t next = 0;
    for (uint32_t l = 0; l < n_local; l++) {
        int64_t row = next, kept = 0;
        mine->offsets[l] = next < p->capacity_rows ? next : p->capacity_rows;
        for (uint32_t from = 0; from < p->n_ranks; from++) {
            for (size_t i = 0; i < (size_t)p->n_tokens[from] * p->top_k; i++) {
                if (expected[from].expert[i] != (int32_t)(rank * n_local + l))
                    continue;
                if (row < p->capacity_rows) {
                    expected[from].row[i] = (int32_t)row;
                    mine->source[row] = (int32_t)((size_t)from * p->max_tokens * p->top_k + i);
                    kept++;
                } else {
                    mine->dropped_rows++;
                }
                row++;
            }
        }
        mine->m_splits[l] = kept;
        next += (row - next + p->alignment - 1) / p->alignment * p->alignment;
    }
    mine->offsets[n_local] = next < p->capacity_rows ? next : p->capacity_rows;
    mine->needed_rows = next;
    if (next > p->capacity_rows && mine->error.status == 0)
        mine->error = (struct kernel_error){EPD_CAPACITY_OVERFLOW, rank, -1, -1, next, p->capacity_rows};
}

void reference_route(const struct problem *p, const struct rank_input *input, struct rank_expected *expected)
{
    size_t slots = (size_t)p->max_tokens * p->top_k, rows = (size_t)p->capacity_rows;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        struct rank_expected *mine = &expected[rank];
        *mine = (struct rank_expected){
            .expert = malloc(slots * 4 + 4),
            .row = malloc(slots * 4 + 4),
            .counts = calloc((size_t)p->n_ranks * p->n_experts, 4),
            .source = malloc(rows * 4 + 4),
            .m_splits = calloc(p->n_experts, 8),
            .offsets = calloc(p->n_experts + 1, 8),
        };
        memset(mine->row, 0xff, slots * 4);
        memset(mine->source, 0xff, rows * 4);
    }
    for (uint32_t rank = 0; rank < p->n_ranks; rank++)
        for (uint32_t token = 0; token < p->n_tokens[rank]; token++)
            check_token(p, input, expected, rank, token);
    for (uint32_t rank = 0; rank < p->n_ranks; rank++)
        fill_slabs(p, expected, rank);
}

void reference_free(const struct problem *p, struct rank_expected *expected)
{
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        free(expected[rank].expert);
        free(expected[rank].row);
        free(expected[rank].counts);
        free(expected[rank].source);
        free(expected[rank].m_splits);
        free(expected[rank].offsets);
    }
}

/* The slots of (rank, token) on `at`, in order of k, into sum. Returns how many there are. */
static int add_slots(const struct problem *p, const struct rank_input *input,
                     const struct rank_expected *expected, uint32_t rank, uint32_t token, uint32_t at,
                     int weighted, float *sum)
{
    int n = 0;
    for (uint32_t k = 0; k < p->top_k; k++) {
        size_t i = (size_t)token * p->top_k + k;
        int32_t row = expected[rank].row[i];
        if (row < 0 || (uint32_t)expected[rank].expert[i] / (p->n_experts / p->n_ranks) != at)
            continue;
        float weight = weighted ? input[rank].topk_weights[i] : 1.0f;
        for (uint32_t h = 0; h < p->hidden; h++)
            sum[h] = fmaf(weight, element_get(input[at].y, (size_t)row * p->hidden + h, p->dtype), sum[h]);
        n++;
    }
    return n;
}

/* What the ranks of one node, first to end - 1, have of a token that has come to `self` there: its own slots unrounded,
 * the others' sums rounded. */
static void node_sum(const struct problem *p, const struct rank_input *input,
                     const struct rank_expected *expected, uint32_t rank, uint32_t token, int weighted,
                     uint32_t first, uint32_t end, uint32_t self, float *sum)
{
    float *part = malloc(p->hidden * sizeof(float));
    void *rounded = malloc(p->hidden * sizeof(float));
    memset(sum, 0, p->hidden * sizeof(float));
    for (uint32_t at = first; at < end; at++) {
        if (at == self) {
            add_slots(p, input, expected, rank, token, at, weighted, sum);
            continue;
        }
        memset(part, 0, p->hidden * sizeof(float));
        if (add_slots(p, input, expected, rank, token, at, weighted, part) == 0)
            continue;
        for (uint32_t h = 0; h < p->hidden; h++) {
            element_set(rounded, h, p->dtype, part[h]);
            sum[h] += element_get(rounded, h, p->dtype);
        }
    }
    free(part);
    free(rounded);
}

void reference_combine_row(const struct problem *p, const struct rank_input *input,
                           const struct rank_expected *expected, uint32_t rank, uint32_t token, int weighted,
                           void *out)
{
    float *sum = malloc(p->hidden * sizeof(float));
    node_sum(p, input, expected, rank, token, weighted, 0, p->n_ranks, rank, sum);
    for (uint32_t h = 0; h < p->hidden; h++)
        element_set(out, h, p->dtype, sum[h]);
    free(sum);
}

void reference_hop_row(const struct problem *p, const struct rank_input *input,
                       const struct rank_expected *expected, uint32_t n_nodes, uint32_t rank, uint32_t token,
                       int weighted, void *out)
{
    uint32_t n_here = p->n_ranks / n_nodes;
    float *sum = calloc(p->hidden, sizeof(float)), *part = malloc(p->hidden * sizeof(float));
    for (uint32_t node = 0; node < n_nodes; node++) {
        uint32_t first = node * n_here;
        node_sum(p, input, expected, rank, token, weighted, first, first + n_here, first + rank % n_here,
                 part);
        for (uint32_t h = 0; h < p->hidden; h++) {
            element_set(out, h, p->dtype, part[h]);
            sum[h] += element_get(out, h, p->dtype);
        }
    }
    for (uint32_t h = 0; h < p->hidden; h++)
        element_set(out, h, p->dtype, sum[h]);
    free(sum);
    free(part);
}
