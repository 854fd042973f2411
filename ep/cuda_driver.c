#include "ep/cuda_driver.h"

#include "kernels/cuda/error.h"

static enum epd_status find(const char *name, unsigned version, void **function, struct epd_error *error)
{
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    if (cuda_runtime_check(
            cudaGetDriverEntryPointByVersion(name, function, version, cudaEnableDefault, &found), name,
            error))
        return error->status;
    if (found != cudaDriverEntryPointSuccess || !*function)
        return error_set(error, EPD_UNSUPPORTED, "the NVIDIA driver has no %s", name);
    return EPD_OK;
}

enum epd_status cuda_driver_load(struct cuda_driver *driver, struct epd_error *error)
{
    struct cuda_driver loaded;
    /* POSIX lets a data pointer become a function pointer this way; ISO C has no cast for it. */
#define FIND(name, version)                                                                                  \
    if (find(#name, version, (void **)&loaded.name, error))                                                  \
        return error->status;
    CUDA_DRIVER_FUNCTIONS(FIND)
#undef FIND
    *driver = loaded;
    return EPD_OK;
}

enum epd_status cuda_driver_check(const struct cuda_driver *driver, CUresult result, const char *what,
                                  struct epd_error *error)
{
    const char *text = NULL;
    if (result == CUDA_SUCCESS)
        return EPD_OK;
    (void)driver->cuGetErrorString(result, &text);
    return error_set(error, cuda_error_status((int)result), "%s: %s (%d)", what,
                     text ? text : "unknown error", (int)result);
}

enum epd_status cuda_runtime_check(cudaError_t result, const char *what, struct epd_error *error)
{
    if (result == cudaSuccess)
        return EPD_OK;
    return error_set(error, cuda_error_status((int)result), "%s: %s (%s)", what, cudaGetErrorString(result),
                     cudaGetErrorName(result));
}
