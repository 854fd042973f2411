/* A communicator's beginning and end. It must end in two parts: a swap that waits for a node that is gone has to leave its
 * stream at once, but while NCCL frees a communicator CUDA waits for whole devices, streams that wait for clients and
 * kernels that wait for other lanes included, and holds up every call of the process meanwhile (both measured). So all
 * swaps can be made to leave, and the communicator goes when nothing runs or waits on any device of the process and
 * nothing will until that is done (quiet.h).
 *
 * Communicators are not blocking: ncclCommGetAsyncError says how far their last call is. One thread at a time, on which
 * their device is current. nccl_library_load has gone well. */
#ifndef EPD_EP_NCCL_COMM_H
#define EPD_EP_NCCL_COMM_H

#include "ep/cuda_rail.h"
#include "ep/nccl_library.h"

/* Before any thread runs. NCCL's name of a network, "" for its own choice; "tcp", the transports' common word, is its
 * Socket. */
void nccl_comm_choose_network(const char *name);
/* Makes a communicator of this device alone, which stays, and swaps [bytes] of memory with itself: everything that NCCL
 * loads has been loaded then. memory: [2, bytes] of the rail's; nothing is left in its stream, also if it fails. */
EPD_MUST_CHECK enum epd_status nccl_comm_begin_device(struct cuda_rail *rail, char *memory, size_t bytes,
                                                      struct epd_error *error);
/* What NCCL says. */
int nccl_comm_begin(struct ncclComm **comm, uint32_t n_nodes, uint32_t node, const struct nccl_id *id);
/* Returns when no swap is left in any stream, however long their streams take to come there. 1: the communicator is still
 * there, of no use to anybody; 0: it is gone, for its last call did not end otherwise. */
int nccl_comm_leave_streams(struct ncclComm *comm);

/* What ends. An id is a socket and a thread that waits for as many nodes as the first one that comes tells it of, for ever
 * if they do not come: where no communicator came to be with it, it ends too. */
struct nccl_end {
    struct ncclComm *comm; /* NULL: none */
    int failed;            /* else what was sent last is on its way then: other nodes may still wait for it */
    const struct nccl_id *id; /* nobody has come for it; NULL: it is not ours */
};
/* Returns when all are gone, or after TRANSPORT_END_MS, whichever is first. In a quiet moment. tests/gpu/fabric/test_rail.c
 * prints how long that takes on GPUs. */
void nccl_comm_end_all(struct nccl_end *ends, uint32_t n);

#endif
