#include "client/bench/traffic.h"

#include <stdlib.h>

#include "client/bench/fill.h"

struct counts {
    double sent[JOB_MAX_RANKS], received[JOB_MAX_RANKS]; /* rows over the wire */
    double kept[JOB_MAX_RANKS];                          /* rows for the rank itself */
    double pairs[JOB_MAX_RANKS];                         /* received, per (token, expert) */
    double network;                                      /* tokens to and from node 0 */
};

/* nodes: that hold an expert of the token. */
static void count_nodes(uint32_t own, uint64_t nodes, struct counts *counts)
{
    if (own == 0)
        counts->network += __builtin_popcountll(nodes & ~1ull);
    else
        counts->network += (double)(nodes & 1);
}

static void count_rank(const struct job *job, uint32_t rank, const int32_t *experts, struct counts *counts)
{
    const uint32_t n_local = job->n_experts / job->n_ranks;
    const uint32_t per_node = job->n_ranks / (job->n_nodes > 1 ? job->n_nodes : 1);
    for (uint32_t t = 0; t < job->n_tokens; t++) {
        uint64_t seen = 0, nodes = 0;
        for (uint32_t k = 0; k < job->top_k; k++) {
            const uint32_t to = (uint32_t)experts[(size_t)t * job->top_k + k] / n_local;
            counts->pairs[to]++;
            nodes |= 1ull << to / per_node;
            if (seen >> to & 1)
                continue;
            seen |= 1ull << to;
            counts->sent[rank] += to != rank;
            counts->received[to] += to != rank;
            counts->kept[rank] += to == rank;
        }
        count_nodes(rank / per_node, nodes, counts);
    }
}

static double larger(double a, double b)
{
    return a > b ? a : b;
}

enum epd_status traffic_count(const struct job *job, struct traffic *traffic)
{
    struct counts counts = {0};
    *traffic = (struct traffic){0};
    if (job_n_crossings(job) == 0)
        return EPD_OK;
    int32_t *experts = calloc((size_t)job->n_tokens * job->top_k, sizeof(int32_t));
    if (!experts)
        return EPD_NO_MEMORY;
    enum epd_status status = EPD_OK;
    for (uint32_t rank = 0; status == EPD_OK && rank < job->n_ranks; rank++) {
        status = fill_routing(job, rank, experts, NULL);
        if (status == EPD_OK)
            count_rank(job, rank, experts, &counts);
    }
    free(experts);
    const double row_bytes = (double)job_n_crossings(job) * job->hidden * job_dtype_bytes(job->dtype);
    for (uint32_t rank = 0; rank < job->n_ranks; rank++) {
        const double wire = larger(counts.sent[rank], counts.received[rank]);
        traffic->wire_bytes = larger(traffic->wire_bytes, wire * row_bytes);
        traffic->moved_bytes = larger(traffic->moved_bytes, (wire + counts.kept[rank]) * row_bytes);
        traffic->rows = larger(traffic->rows, counts.pairs[rank]);
    }
    traffic->network_bytes =
        counts.network / (job->n_ranks / (job->n_nodes > 1 ? job->n_nodes : 1)) * row_bytes;
    return status;
}
