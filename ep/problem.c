#include "ep/problem.h"

#include <string.h>

static enum epd_status check_range(const char *field, uint64_t given, uint64_t min, uint64_t max,
                                   struct epd_error *error)
{
    if (given < min || given > max)
        return error_set(error, EPD_INVALID_ARGUMENT, "group %s: %llu, want %llu..%llu", field,
                         (unsigned long long)given, (unsigned long long)min, (unsigned long long)max);
    return EPD_OK;
}

static enum epd_status check_experts(const struct message_group_config *config, uint32_t world_size,
                                     struct epd_error *error)
{
    uint32_t max_top_k = config->n_experts < EPD_MAX_TOP_K ? config->n_experts : EPD_MAX_TOP_K;
    if (check_range("n_experts", config->n_experts, 1, (uint64_t)EPD_MAX_LOCAL_EXPERTS * world_size, error))
        return error->status;
    if (config->n_experts % world_size)
        return error_set(error, EPD_INVALID_ARGUMENT, "group n_experts: %u, want a multiple of world_size %u",
                         config->n_experts, world_size);
    return check_range("top_k", config->top_k, 1, max_top_k, error);
}

static enum epd_status check_modes(const struct message_group_config *config, struct epd_error *error)
{
    uint32_t alignment = config->alignment;
    if (alignment < 1 || alignment > EPD_MAX_ALIGNMENT || (alignment & (alignment - 1)))
        return error_set(error, EPD_INVALID_ARGUMENT, "group alignment: %u, want a power of two up to %d",
                         alignment, EPD_MAX_ALIGNMENT);
    if (config->dtype != EPD_F32 && config->dtype != EPD_BF16 && config->dtype != EPD_F16)
        return error_set(error, EPD_INVALID_DTYPE, "group dtype: %s, want f32, bf16 or f16",
                         dtype_name(config->dtype));
    if (config->overflow != EPD_OVERFLOW_ERROR && config->overflow != EPD_OVERFLOW_DROP)
        return error_set(error, EPD_INVALID_ARGUMENT, "group overflow: %d, want %d (error) or %d (drop)",
                         (int)config->overflow, (int)EPD_OVERFLOW_ERROR, (int)EPD_OVERFLOW_DROP);
    return EPD_OK;
}

/* Rows and (rank, token, k) triples are int32 in the kernels. */
static enum epd_status check_rows(const struct message_group_config *config, const struct problem *problem,
                                  struct epd_error *error)
{
    uint64_t n_sources = (uint64_t)problem->world_size * problem->max_tokens * problem->top_k;
    if (n_sources > INT32_MAX)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "group world_size %u x max_tokens %u x top_k %u: %llu routed rows, want at most %d",
                         problem->world_size, problem->max_tokens, problem->top_k,
                         (unsigned long long)n_sources, INT32_MAX);
    if (config->capacity_rows < 0 || problem->capacity_rows > INT32_MAX)
        return error_set(
            error, EPD_INVALID_ARGUMENT,
            "group capacity_rows: %lld, want 1..%d, or 0 for the most that can arrive (here %lld)",
            (long long)config->capacity_rows, INT32_MAX, (long long)problem_max_rows(problem));
    return EPD_OK;
}

static enum epd_status divide(struct problem *problem, uint32_t n_nodes, uint32_t node,
                              struct epd_error *error)
{
    if (problem->world_size % n_nodes)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "group world_size: %u, want a multiple of its %u nodes: each has as many ranks",
                         problem->world_size, n_nodes);
    problem->n_nodes = n_nodes;
    problem->node = node;
    problem->ranks_per_node = problem->world_size / n_nodes;
    return EPD_OK;
}

enum epd_status problem_init(struct problem *problem, const struct message_group_config *config,
                             uint32_t world_size, struct epd_error *error)
{
    if (check_range("world_size", world_size, 1, EPD_MAX_WORLD_SIZE, error))
        return error->status;
    return problem_init_any(problem, config, world_size, 1, 0, error);
}

enum epd_status problem_init_any(struct problem *problem, const struct message_group_config *config,
                                 uint32_t world_size, uint32_t n_nodes, uint32_t node,
                                 struct epd_error *error)
{
    if (check_experts(config, world_size, error) ||
        check_range("hidden", config->hidden, 1, EPD_MAX_HIDDEN, error) ||
        check_range("ffn", config->ffn, 0, EPD_MAX_FFN, error) ||
        check_range("max_tokens", config->max_tokens, 1, EPD_MAX_TOKENS, error) || check_modes(config, error))
        return error->status;
    struct problem checked = {
        .world_size = world_size,
        .n_experts = config->n_experts,
        .n_local_experts = config->n_experts / world_size,
        .top_k = config->top_k,
        .hidden = config->hidden,
        .ffn = config->ffn,
        .max_tokens = config->max_tokens,
        .alignment = config->alignment,
        .capacity_rows = config->capacity_rows,
        .dtype = config->dtype,
        .overflow = config->overflow,
    };
    if (checked.capacity_rows == 0)
        checked.capacity_rows = problem_max_rows(&checked);
    if (check_rows(config, &checked, error) || divide(&checked, n_nodes, node, error))
        return error->status;
    *problem = checked;
    return EPD_OK;
}

enum epd_status problem_span(struct problem *problem, uint32_t n_nodes, uint32_t node,
                             struct epd_error *error)
{
    if (check_range("nodes", n_nodes, 1, EPD_MAX_NODES, error) ||
        check_range("node", node, 0, n_nodes - 1, error))
        return error->status;
    return divide(problem, n_nodes, node, error);
}

int64_t problem_max_rows(const struct problem *problem)
{
    int64_t alignment = problem->alignment, n_local = problem->n_local_experts;
    int64_t per_token = problem->top_k < n_local ? problem->top_k : n_local;
    int64_t rows = (int64_t)problem->max_tokens * problem->world_size * per_token + n_local * (alignment - 1);
    return (rows + alignment - 1) / alignment * alignment;
}

uint64_t problem_row_bytes(const struct problem *problem, uint64_t columns)
{
    return (uint64_t)problem->capacity_rows * columns * dtype_bytes(problem->dtype);
}

static int64_t clamp_rows(int64_t rows, int64_t max)
{
    return rows < 0 ? 0 : rows > max ? max : rows;
}

void problem_count_traffic(const struct problem *problem, const int32_t *counts,
                           struct problem_traffic *traffic)
{
    int64_t alignment = problem->alignment;
    memset(traffic, 0, problem->world_size * sizeof *traffic);
    for (uint32_t expert = 0; expert < problem->n_experts; expert++) {
        struct problem_traffic *receiver = &traffic[expert / problem->n_local_experts];
        int64_t rows = 0;
        for (uint32_t rank = 0; rank < problem->world_size; rank++)
            rows += counts[(size_t)rank * problem->n_experts + expert];
        int64_t kept = clamp_rows(problem->capacity_rows - receiver->needed_rows, rows);
        receiver->rows += kept;
        receiver->needed_rows += (rows + alignment - 1) / alignment * alignment;
        receiver->dropped_rows += rows - kept;
    }
}

struct exchange_shape problem_shape(const struct problem *problem)
{
    return (struct exchange_shape){
        .world_size = problem->world_size,
        .n_experts = problem->n_experts,
        .n_local_experts = problem->n_local_experts,
        .top_k = problem->top_k,
        .hidden = problem->hidden,
        .max_tokens = problem->max_tokens,
        .alignment = problem->alignment,
        .capacity_rows = problem->capacity_rows,
        .n_nodes = problem->n_nodes,
    };
}
