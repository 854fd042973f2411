#include "ep/nccl_library.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define NCCL_SONAME "libnccl.so.2"

/* Written once, before any thread runs. */
static struct nccl_library library;
static int loaded;

const struct nccl_library *nccl_library(void)
{
    return loaded ? &library : NULL;
}

/* What the library reads when it is first used. Whoever sets a variable himself keeps it. */
static void set_manners(const char *devices)
{
    (void)setenv("NCCL_RAS_ENABLE", "0", 0);  /* it would listen on a port of its own */
    (void)setenv("NCCL_NVLS_ENABLE", "0", 0); /* a rail has one GPU on each node */
    if (devices[0])
        (void)setenv("NCCL_SOCKET_IFNAME", devices, 0);
}

/* ISO C has no cast from an object pointer to a function pointer. */
static int find(void *handle, const char *name, void *function)
{
    void *found = dlsym(handle, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

static enum epd_status find_all(void *handle, struct epd_error *error)
{
#define NCCL_FIND(name)                                                                                      \
    if (!find(handle, #name, &library.name))                                                                 \
        return error_set(error, EPD_UNSUPPORTED, "fabric: %s has no %s", NCCL_SONAME, #name);
    NCCL_FIND(ncclGetVersion)
    NCCL_FIND(ncclGetErrorString)
    NCCL_FIND(ncclGetLastError)
    NCCL_FIND(ncclGetUniqueId)
    NCCL_FIND(ncclCommInitRankConfig)
    NCCL_FIND(ncclCommGetAsyncError)
    NCCL_FIND(ncclCommFinalize)
    NCCL_FIND(ncclCommDestroy)
    NCCL_FIND(ncclCommAbort)
    NCCL_FIND(ncclCommShrink)
    NCCL_FIND(ncclGroupStart)
    NCCL_FIND(ncclGroupEnd)
    NCCL_FIND(ncclSend)
    NCCL_FIND(ncclRecv)
#undef NCCL_FIND
    return EPD_OK;
}

enum epd_status nccl_library_load(const char *devices, struct epd_error *error)
{
    int version = 0;
    if (loaded)
        return EPD_OK;
    set_manners(devices);
    void *handle = dlopen(NCCL_SONAME, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return error_set(error, EPD_UNSUPPORTED, "fabric: groups across nodes on CUDA need NCCL: %.160s",
                         dlerror());
    if (find_all(handle, error))
        return error->status;
    if (library.ncclGetVersion(&version) != NCCL_OK || version < NCCL_OLDEST)
        return error_set(error, EPD_UNSUPPORTED, "fabric: NCCL %d, want at least %d", version, NCCL_OLDEST);
    loaded = 1;
    return EPD_OK;
}
