#include "ep/hop_frame.h"

#include <string.h>

#include "ep/layout.h"

static void *take(char *base, uint64_t *at, int there, uint64_t bytes)
{
    void *section = there && base ? base + *at : NULL;
    if (there)
        *at += (bytes + HOP_ALIGNMENT - 1) & ~(uint64_t)(HOP_ALIGNMENT - 1);
    return section;
}

void hop_frame_lay(struct hop_frame *frame, const struct problem *problem, uint32_t content,
                   struct hop_tokens tokens, void *data)
{
    const uint64_t n = content & HOP_STATIC ? tokens.limit : tokens.n, n_choices = n * problem->top_k,
                   n_values = n * problem->hidden;
    uint64_t at = 0;
    frame->head = take(data, &at, 1, sizeof(struct hop_head));
    frame->counts = take(data, &at, content & HOP_COUNTS, problem->n_experts * sizeof(int32_t));
    frame->experts = take(data, &at, content & HOP_EXPERTS, n_choices * sizeof(int32_t));
    frame->weights = take(data, &at, content & HOP_WEIGHTS, n_choices * sizeof(float));
    frame->rows = take(data, &at, content & HOP_ROWS, n_values * dtype_bytes(problem->dtype));
    frame->sums = take(data, &at, content & HOP_SUMS, n_values * sizeof(float));
    frame->scalars = take(data, &at, content & HOP_SCALARS, n_choices * sizeof(float));
    frame->bytes = at;
}

void hop_frame_begin(struct hop_frame *frame, const struct problem *problem, uint32_t content,
                     struct hop_tokens tokens, uint64_t step, void *data)
{
    hop_frame_lay(frame, problem, content, tokens, data);
    *frame->head =
        (struct hop_head){.magic = HOP_MAGIC, .content = content, .n_tokens = tokens.n, .step = step};
}

static enum epd_status check_counts(const struct hop_frame *frame, const struct problem *problem,
                                    uint32_t node, struct epd_error *error)
{
    for (uint32_t expert = 0; expert < problem->n_experts; expert++)
        if (frame->counts[expert] < 0 || frame->counts[expert] > (int64_t)problem->max_tokens)
            return error_set(error, EPD_PROTOCOL, "node %u: %d rows for expert %u, want 0..%u", node,
                             frame->counts[expert], expert, problem->max_tokens);
    return EPD_OK;
}

static enum epd_status check_experts(const struct hop_frame *frame, const struct problem *problem,
                                     uint32_t node, struct epd_error *error)
{
    const size_t n = (size_t)frame->head->n_tokens * problem->top_k;
    for (size_t i = 0; i < n; i++)
        if (frame->experts[i] < -1 || frame->experts[i] >= (int64_t)problem->n_experts)
            return error_set(error, EPD_PROTOCOL, "node %u: expert %d, want -1..%u", node, frame->experts[i],
                             problem->n_experts - 1);
    return EPD_OK;
}

/* Rows of an expert of this node are laid out by its count and filled by those who chose it: with another number of them
 * they would lie in the rows of others. The counts are as they were when it returns. */
static enum epd_status compare_counts(const struct hop_frame *frame, const struct problem *problem,
                                      uint32_t node, struct epd_error *error)
{
    const size_t n = (size_t)frame->head->n_tokens * problem->top_k;
    const uint32_t n_here = problem->n_local_experts * problem->ranks_per_node;
    for (size_t i = 0; i < n; i++)
        if (frame->experts[i] >= 0)
            frame->counts[frame->experts[i]]--;
    for (uint32_t expert = problem->node * n_here; expert < (problem->node + 1) * n_here; expert++)
        if (frame->counts[expert] && !error->status)
            (void)error_set(error, EPD_PROTOCOL,
                            "node %u: %d more rows for expert %u than tokens that chose it", node,
                            frame->counts[expert], expert);
    for (size_t i = 0; i < n; i++)
        if (frame->experts[i] >= 0)
            frame->counts[frame->experts[i]]++;
    return error->status;
}

enum epd_status hop_frame_check(struct hop_frame *frame, const struct problem *problem, uint32_t content,
                                struct hop_tokens tokens, uint64_t step, uint32_t node, void *data,
                                uint64_t bytes, struct epd_error *error)
{
    const struct hop_head *head = data;
    if (bytes < sizeof *head || head->magic != HOP_MAGIC || head->step != step)
        return error_set(error, EPD_PROTOCOL, "node %u: a message of %llu bytes that is not of step %llu",
                         node, (unsigned long long)bytes, (unsigned long long)step);
    if (head->status)
        return error_set(error, EPD_PEER_LOST, "node %u has ended the step (%s)", node,
                         status_known(head->status) ? status_name((enum epd_status)head->status) : "EPD_?");
    if (head->content != content || head->n_tokens > tokens.limit ||
        (tokens.n != UINT32_MAX && head->n_tokens != tokens.n))
        return error_set(error, EPD_PROTOCOL, "node %u: content %u of %u tokens, want %u of %u", node,
                         head->content, head->n_tokens, content,
                         tokens.n == UINT32_MAX ? tokens.limit : tokens.n);
    tokens.n = head->n_tokens;
    hop_frame_lay(frame, problem, content, tokens, data);
    if (frame->bytes != bytes)
        return error_set(error, EPD_PROTOCOL, "node %u: %llu bytes, want %llu", node,
                         (unsigned long long)bytes, (unsigned long long)frame->bytes);
    if (frame->counts && check_counts(frame, problem, node, error))
        return error->status;
    if (frame->experts && check_experts(frame, problem, node, error))
        return error->status;
    error->status = EPD_OK;
    return frame->counts && frame->experts ? compare_counts(frame, problem, node, error) : EPD_OK;
}
