/* What the worker counts. Counters only grow while the worker lives. Loop thread. */
#ifndef EPD_DAEMON_STATS_H
#define EPD_DAEMON_STATS_H

#include "daemon/close_reason.h"
#include "daemon/histogram.h"
#include "ep/step.h"
#include "proto/message.h"

#define STATS_N_STATUSES 64 /* above every wire number of status.h */

struct stats_op {
    uint64_t launches, failed; /* of ranks: a step of four ranks counts four */
    uint64_t tokens, rows, dropped_rows, wire_bytes, network_bytes, copied_bytes, flops;
    struct histogram gather_ns;         /* per step: first rank's request to last rank's */
    struct histogram run_ns;            /* per step: submitted to the loop hearing of its end */
    uint64_t phase_ns[EPD_PHASE_COUNT]; /* of all ranks */
};

struct stats {
    uint64_t sessions_opened, sessions_refused;
    uint64_t sessions_closed[CLOSE_REASON_COUNT];
    uint64_t requests[MESSAGE_KIND_COUNT];
    uint64_t errors[STATS_N_STATUSES];          /* error replies by status */
    uint64_t failed_launches[STATS_N_STATUSES]; /* by status */
    uint64_t window_full;                       /* how often reading from a client was paused */
    struct stats_op ops[EPD_OP_COUNT];
};

/* Per group; in struct group. */
struct load {
    int64_t *expert_rows; /* owned, [n_experts], rows so far */
    uint32_t n_experts;
    uint64_t n_steps;                     /* that routed something */
    double imbalance_last, imbalance_sum; /* busiest expert over the mean */
};

void stats_count_error(struct stats *stats, enum epd_status status);
/* A launch that ended without running. */
void stats_count_failed(struct stats *stats, enum epd_op op, enum epd_status status, uint32_t n_launches);
/* A step that ran: result of all its ranks, tokens of all its ranks, and how long it gathered and ran. */
void stats_count_step(struct stats *stats, enum epd_op op, const struct step_result *result,
                      uint64_t n_tokens, uint64_t gather_ns, uint64_t run_ns);

/* Memory for the rows of n_experts; EPD_NO_MEMORY. */
EPD_MUST_CHECK enum epd_status load_init(struct load *load, uint32_t n_experts, struct epd_error *error);
void load_fini(struct load *load);
/* expert_rows may be NULL: the op routes nothing. */
void load_count(struct load *load, const int64_t *expert_rows, uint32_t n_experts);
/* Index of the expert with most rows so far; 0 if none. */
uint32_t load_hottest(const struct load *load);

#endif
