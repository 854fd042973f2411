#include "client/bench/job.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const op_names[] = {
    [JOB_HANDOFF_BARRIER] = "handoff_barrier",
    [JOB_HANDOFF_GROUPED_GEMM] = "handoff_grouped_gemm",
    [JOB_DISPATCH] = "dispatch",
    [JOB_COMBINE] = "combine",
    [JOB_COMBINE_WEIGHTED] = "combine_weighted",
    [JOB_DISPATCH_BWD] = "dispatch_bwd",
    [JOB_COMBINE_BWD] = "combine_bwd",
    [JOB_GROUPED_GEMM] = "grouped_gemm",
    [JOB_MOE_FORWARD] = "moe_forward",
    [JOB_MOE_BACKWARD] = "moe_backward",
    [JOB_LINK] = "link",
    [JOB_PEER_LOSS] = "peer_loss",
};

struct standard_case {
    const char *name;
    uint32_t n_tokens, hidden, ffn, n_experts, top_k;
};

static const struct standard_case standard_cases[] = {
    {"dsv3", 4096, 7168, 2048, 256, 8},     {"qwen235b", 4096, 4096, 1536, 128, 8},
    {"qwen30b", 8192, 2048, 768, 128, 8},   {"mixtral", 4096, 4096, 14336, 8, 2},
    {"decode128", 128, 7168, 2048, 256, 8}, {"tiny", 256, 256, 512, 8, 2},
};

const char *job_op_name(enum job_op op)
{
    return op_names[op];
}

const char *job_socket(const struct job *job, uint32_t rank)
{
    const uint32_t node = job->n_nodes > 1 ? rank / (job->n_ranks / job->n_nodes) : 0;
    return node ? job->other_sockets[node - 1] : job->socket_path;
}

const char *job_dtype_name(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? "f32" : dtype == EPD_BF16 ? "bf16" : "f16";
}

uint32_t job_dtype_bytes(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? 4 : 2;
}

int job_take_case(struct job *job, const char *name)
{
    for (size_t i = 0; i < sizeof(standard_cases) / sizeof(standard_cases[0]); i++) {
        const struct standard_case *found = &standard_cases[i];
        if (strcmp(found->name, name) != 0)
            continue;
        (void)snprintf(job->case_name, sizeof(job->case_name), "%s", name);
        job->n_tokens = found->n_tokens;
        job->hidden = found->hidden;
        job->ffn = found->ffn;
        job->n_experts = found->n_experts;
        job->top_k = found->top_k;
        return 1;
    }
    return 0;
}

const char *job_case_names(void)
{
    return "dsv3, qwen235b, qwen30b, mixtral, decode128, tiny";
}

int job_n_crossings(const struct job *job)
{
    switch (job->op) {
    case JOB_DISPATCH:
    case JOB_COMBINE:
    case JOB_COMBINE_WEIGHTED:
    case JOB_DISPATCH_BWD:
    case JOB_COMBINE_BWD:
        return 1;
    case JOB_MOE_FORWARD:
    case JOB_MOE_BACKWARD:
        return 2;
    default:
        return 0;
    }
}

double job_flops(const struct job *job)
{
    const double pairs = (double)job->n_tokens * job->top_k, weights = (double)job->hidden * job->ffn;
    switch (job->op) {
    case JOB_GROUPED_GEMM:
        return 2 * pairs * 2 * weights;
    case JOB_MOE_FORWARD:
        return 2 * pairs * 3 * weights;
    case JOB_MOE_BACKWARD:
        return 2 * 2 * pairs * 3 * weights;
    default:
        return 0;
    }
}

double job_host_bytes(const struct job *job)
{
    const double element = job_dtype_bytes(job->dtype);
    const double tokens = (double)job->n_ranks * job->n_tokens;
    /* Without a capacity: every token's choices, as many as one rank has experts for, could go to the same
     * rank. */
    const double choices = fmin(job->top_k, (double)job->n_experts / job->n_ranks);
    const double rows = job->n_ranks * (job->capacity_rows ? (double)job->capacity_rows : tokens * choices);
    const double weights =
        job->op >= JOB_GROUPED_GEMM ? 3.0 * job->n_experts * job->hidden * job->ffn * element : 0;
    const double slabs =
        rows * element * (job->op >= JOB_MOE_FORWARD ? 2.0 * job->hidden + 3.0 * job->ffn : job->hidden);
    const double copies = job->op == JOB_MOE_BACKWARD ? 2 : 1; /* gradients, and what is kept for them */
    if (job->op <= JOB_HANDOFF_GROUPED_GEMM)
        return 1e6;
    return copies * (weights + slabs) + 4 * tokens * job->hidden * element;
}
