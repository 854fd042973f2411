#include "ep/ucx_library.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#define UCX_SONAME "libucp.so.0"

/* Written once, before any thread runs. */
static struct ucx_library library;
static int loaded;

const struct ucx_library *ucx_library(void)
{
    return loaded ? &library : NULL;
}

/* What the library reads when it is loaded. Whoever sets a variable himself keeps it. */
static void set_manners(void)
{
    (void)setenv("UCX_HANDLE_ERRORS", "none", 0); /* signals are the daemon's */
    (void)setenv("UCX_MEM_EVENTS", "no", 0);      /* no hooks in malloc and mmap */
    (void)setenv("UCX_LOG_LEVEL", "fatal", 0);    /* errors come back as values */
    (void)setenv("UCX_WARN_UNUSED_ENV_VARS", "no", 0);
    /* UCX 1.13 aborts the process where a peer dies while both sides connect (test_rail.c shows it): an event already
     * fetched may belong to a connection that the event before it has closed, so they are fetched one by one; and a
     * connection refused inside ucp_ep_create ends an endpoint that is not complete, so none is waited for there. */
    (void)setenv("UCX_TCP_MAX_POLL", "1", 0);
    (void)setenv("UCX_TCP_CONN_NB", "y", 0);
}

/* ISO C has no cast from an object pointer to a function pointer. */
static int find(void *handle, const char *name, void *function)
{
    void *found = dlsym(handle, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

enum epd_status ucx_library_load(struct epd_error *error)
{
    if (loaded)
        return EPD_OK;
    set_manners();
    void *handle = dlopen(UCX_SONAME, RTLD_NOW | RTLD_GLOBAL);
    if (!handle)
        return error_set(error, EPD_UNSUPPORTED, "fabric: %s", dlerror());
#define UCX_FIND(name)                                                                                       \
    if (!find(handle, #name, &library.name))                                                                 \
        return error_set(error, EPD_UNSUPPORTED, "fabric: %s has no %s", UCX_SONAME, #name);
    UCX_FUNCTIONS(UCX_FIND)
#undef UCX_FIND
    if (!find(handle, "ucs_status_string", &library.status_string))
        return error_set(error, EPD_UNSUPPORTED, "fabric: %s has no ucs_status_string", UCX_SONAME);
    loaded = 1;
    return EPD_OK;
}
