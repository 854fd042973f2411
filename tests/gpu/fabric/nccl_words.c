/* Compiled where there is a header of NCCL: ep/nccl_library.h says the same. */
#include <nccl.h>

#include "ep/nccl_library.h"

#define SAME(ours, theirs)       _Static_assert((ours) == (theirs), #ours)
#define SAME_FIELD(ours, theirs) SAME(offsetof(struct nccl_config, ours), offsetof(ncclConfig_t, theirs))

SAME(NCCL_ID_BYTES, sizeof(ncclUniqueId));
SAME(NCCL_OLDEST, NCCL_VERSION(2, 27, 0));
SAME(NCCL_CONFIG_VERSION, NCCL_VERSION(2, 18, 0));
SAME(NCCL_SHRINK_BY_ABORT, NCCL_SHRINK_ABORT);
SAME(NCCL_CONFIG_NOT_CHOSEN, NCCL_CONFIG_UNDEF_INT);
SAME(NCCL_TYPE_INT8, (int)ncclInt8);
SAME((int)NCCL_OK, (int)ncclSuccess);
SAME((int)NCCL_CUDA_ERROR, (int)ncclUnhandledCudaError);
SAME((int)NCCL_SYSTEM_ERROR, (int)ncclSystemError);
SAME((int)NCCL_REMOTE_ERROR, (int)ncclRemoteError);
SAME((int)NCCL_IN_PROGRESS, (int)ncclInProgress);
SAME_FIELD(size, size);
SAME_FIELD(magic, magic);
SAME_FIELD(version, version);
SAME_FIELD(blocking, blocking);
SAME_FIELD(cga_cluster_size, cgaClusterSize);
SAME_FIELD(min_ctas, minCTAs);
SAME_FIELD(max_ctas, maxCTAs);
SAME_FIELD(net_name, netName);
SAME_FIELD(split_share, splitShare);
_Static_assert(sizeof(struct nccl_config) <= sizeof(ncclConfig_t), "a prefix");
