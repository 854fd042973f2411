/* The daemons of a benchmark: one, or several on this machine as the nodes of a fabric over the loopback, with a secret and
 * a port of their own. Owned by main. */
#ifndef EPD_BENCH_FABRIC_H
#define EPD_BENCH_FABRIC_H

#include "client/bench/daemon.h"
#include "client/bench/job.h"

struct fabric {
    uint32_t n_nodes; /* started */
    struct daemon nodes[JOB_MAX_NODES];
    char secret_path[96], rendezvous[64];
};

/* n_nodes daemons; n_gpus: that several of them share evenly, 0 for hosts. Errors have been printed; what was started is to be
 * stopped all the same. Sets the environment of what is started from here on. */
enum epd_status fabric_start(struct fabric *fabric, uint32_t n_nodes, uint32_t n_gpus,
                             const struct daemon_options *options);
/* Legal when nothing was started. */
void fabric_stop(struct fabric *fabric);
void fabric_print_logs(const struct fabric *fabric);

#endif
