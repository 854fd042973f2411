#include "client/driver_cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

/* Written once, under opened; read-only afterwards. */
static struct driver functions;
static pthread_once_t opened = PTHREAD_ONCE_INIT;
static char missing[128] = "libcuda.so.1 was not opened";

static void driver_open(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(missing, sizeof missing, "no NVIDIA driver: %.100s", dlerror());
        return;
    }
#define FIND(name, symbol)                                                                                   \
    *(void **)&functions.name = dlsym(library, symbol);                                                      \
    if (!functions.name) {                                                                                   \
        snprintf(missing, sizeof missing, "the NVIDIA driver has no %s", symbol);                            \
        return;                                                                                              \
    }
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    missing[0] = 0;
}

enum epd_status driver_check(struct epd_error *error)
{
    pthread_once(&opened, driver_open);
    return missing[0] ? error_set(error, EPD_UNSUPPORTED, "%s", missing) : EPD_OK;
}

const struct driver *driver(void)
{
    return &functions;
}

enum epd_status driver_result(CUresult result, const char *what, struct epd_error *error)
{
    const char *text = NULL;
    if (result == CUDA_SUCCESS)
        return EPD_OK;
    (void)functions.cuGetErrorString(result, &text);
    return error_set(error, result == CUDA_ERROR_OUT_OF_MEMORY ? EPD_NO_MEMORY : EPD_CUDA, "%s: %s (%d)",
                     what, text ? text : "unknown error", (int)result);
}
