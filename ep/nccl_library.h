/* NCCL, opened at run time: a daemon of one node needs none, and neither does a build. What is declared here is the part
 * of NCCL's stable C interface that rails use, in its words; tests/gpu/fabric compares it with nccl.h where there is one.
 * Loaded once, before any thread runs. */
#ifndef EPD_EP_NCCL_LIBRARY_H
#define EPD_EP_NCCL_LIBRARY_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

struct CUstream_st;
struct ncclComm;

/* The oldest NCCL that can end what is in its streams apart from its own end (ncclCommShrink), 2.27. */
#define NCCL_OLDEST 22700
/* The version that configurations are written as. */
#define NCCL_CONFIG_VERSION    21800
#define NCCL_ID_BYTES          128
#define NCCL_CONFIG_MAGIC      0xcafebeefu
#define NCCL_CONFIG_NOT_CHOSEN INT_MIN
#define NCCL_TYPE_INT8         0
#define NCCL_SHRINK_BY_ABORT   1

enum nccl_result {
    NCCL_OK = 0,
    NCCL_CUDA_ERROR = 1,
    NCCL_SYSTEM_ERROR = 2,
    NCCL_REMOTE_ERROR = 6,
    NCCL_IN_PROGRESS = 7
};

struct nccl_id {
    char bytes[NCCL_ID_BYTES];
};

/* As of 2.18: later versions read as much as `size` says, and what `version` knew. */
struct nccl_config {
    size_t size;
    unsigned int magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

struct nccl_library {
    int (*ncclGetVersion)(int *version);
    const char *(*ncclGetErrorString)(int result);
    const char *(*ncclGetLastError)(struct ncclComm *comm);
    int (*ncclGetUniqueId)(struct nccl_id *id);
    int (*ncclCommInitRankConfig)(struct ncclComm **comm, int n_ranks, struct nccl_id id, int rank,
                                  struct nccl_config *config);
    int (*ncclCommGetAsyncError)(struct ncclComm *comm, int *result);
    int (*ncclCommFinalize)(struct ncclComm *comm);
    int (*ncclCommDestroy)(struct ncclComm *comm);
    int (*ncclCommAbort)(struct ncclComm *comm);
    int (*ncclCommShrink)(struct ncclComm *comm, int *excluded, int n_excluded, struct ncclComm **shrunk,
                          struct nccl_config *config, int flags);
    int (*ncclGroupStart)(void);
    int (*ncclGroupEnd)(void);
    int (*ncclSend)(const void *data, size_t count, int type, int peer, struct ncclComm *comm,
                    struct CUstream_st *stream);
    int (*ncclRecv)(void *data, size_t count, int type, int peer, struct ncclComm *comm,
                    struct CUstream_st *stream);
};

/* NULL before nccl_library_load. */
const struct nccl_library *nccl_library(void);
/* EPD_UNSUPPORTED, and what is missing. devices: network interfaces that NCCL may use; "" for its own choice. */
EPD_MUST_CHECK enum epd_status nccl_library_load(const char *devices, struct epd_error *error);

#endif
