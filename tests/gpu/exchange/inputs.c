#include "tests/gpu/exchange/inputs.h"

const char *const pattern_names[] = {"uniform", "all_to_one", "none", "some_none", "hostile"};

static uint64_t random_state = 1;

static uint32_t random_u32(void)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(random_state >> 33);
}

static float random_float(void)
{
    return (float)random_u32() / 1073741824.0f - 1.0f;
}

static int64_t random_expert(const struct problem *p, const int64_t *earlier, uint32_t k)
{
    for (;;) {
        int64_t value = random_u32() % p->n_experts;
        int again = 0;
        for (uint32_t j = 0; j < k; j++)
            again |= earlier[j] == value;
        if (!again)
            return value;
    }
}

static void fill_token(const struct problem *p, enum pattern pattern, int64_t *idx)
{
    static const int64_t hostile[] = {-2, INT32_MIN, INT32_MAX, 1000000};
    for (uint32_t k = 0; k < p->top_k; k++) {
        idx[k] = pattern == NONE         ? -1
                 : pattern == ALL_TO_ONE ? (int64_t)p->n_experts - 1
                                         : random_expert(p, idx, k);
        if (pattern == SOME_NONE && random_u32() % 3 == 0)
            idx[k] = -1;
        if (pattern == HOSTILE && random_u32() % 5 == 0)
            idx[k] = random_u32() % 2 ? hostile[random_u32() % 4] : k ? idx[k - 1] : (int64_t)p->n_experts;
    }
}

static void fill_elements(void *data, size_t n, enum epd_dtype dtype)
{
    for (size_t i = 0; i < n; i++)
        element_set(data, i, dtype, random_float());
}

void inputs_make(struct problem *p, enum pattern pattern, int uneven, struct rank_input *input)
{
    size_t slots = (size_t)p->max_tokens * p->top_k, elements = (size_t)p->max_tokens * p->hidden;
    random_state = p->max_tokens * 7919u + p->n_experts * 31u + p->hidden;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        p->n_tokens[rank] = uneven && rank % 2 ? 0 : p->max_tokens - (rank == 2 ? p->max_tokens / 3 : 0);
        input[rank] = (struct rank_input){.topk_idx = malloc(slots * 8 + 8),
                                          .topk_weights = malloc(slots * 4 + 8),
                                          .x = malloc(elements * 4 + 8),
                                          .dout = malloc(elements * 4 + 8)};
        for (uint32_t token = 0; token < p->max_tokens; token++)
            fill_token(p, pattern, input[rank].topk_idx + (size_t)token * p->top_k);
        for (size_t i = 0; i < slots; i++)
            input[rank].topk_weights[i] = random_float();
        fill_elements(input[rank].x, elements, p->dtype);
        fill_elements(input[rank].dout, elements, p->dtype);
    }
}

void inputs_make_y(const struct problem *p, struct rank_input *input)
{
    size_t elements = (size_t)p->capacity_rows * p->hidden;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        input[rank].y = malloc(elements * 4 + 8);
        fill_elements(input[rank].y, elements, p->dtype);
    }
}

int64_t inputs_needed_rows(const struct problem *problem, const struct rank_input *input)
{
    struct problem p = *problem;
    struct rank_expected expected[CLUSTER_MAX_RANKS];
    int64_t needed = 0;
    p.capacity_rows = 0;
    reference_route(&p, input, expected);
    for (uint32_t rank = 0; rank < p.n_ranks; rank++)
        needed = expected[rank].needed_rows > needed ? expected[rank].needed_rows : needed;
    reference_free(&p, expected);
    return needed;
}

void inputs_free(const struct problem *p, struct rank_input *input)
{
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        free(input[rank].topk_idx);
        free(input[rank].topk_weights);
        free(input[rank].x);
        free(input[rank].dout);
        free(input[rank].y);
    }
}
