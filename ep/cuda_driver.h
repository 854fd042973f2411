/* The driver functions that the runtime has no form of, found at run time: the binary links no driver library
 * and starts on machines that have none. Any thread. */
#ifndef EPD_EP_CUDA_DRIVER_H
#define EPD_EP_CUDA_DRIVER_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "proto/status.h"

#define CUDA_DRIVER_FUNCTIONS(X)                                                                             \
    X(cuGetErrorString, 6000)                                                                                \
    X(cuMemGetAllocationGranularity, 10020)                                                                  \
    X(cuMemCreate, 10020)                                                                                    \
    X(cuMemRelease, 10020)                                                                                   \
    X(cuMemAddressReserve, 10020)                                                                            \
    X(cuMemAddressFree, 10020)                                                                               \
    X(cuMemMap, 10020)                                                                                       \
    X(cuMemUnmap, 10020)                                                                                     \
    X(cuMemSetAccess, 10020)                                                                                 \
    X(cuMemExportToShareableHandle, 10020)                                                                   \
    X(cuMemImportFromShareableHandle, 10020)                                                                 \
    X(cuMemGetAllocationPropertiesFromHandle, 10020)                                                         \
    X(cuMemGetAddressRange, 3020)                                                                            \
    X(cuStreamWriteValue32, 11070)                                                                           \
    X(cuStreamWriteValue64, 11070)                                                                           \
    X(cuStreamBatchMemOp, 11070)

#define CUDA_DRIVER_POINTER(name, version) __typeof__(name) *name;
struct cuda_driver {
    CUDA_DRIVER_FUNCTIONS(CUDA_DRIVER_POINTER)
};
#undef CUDA_DRIVER_POINTER

/* EPD_UNSUPPORTED naming the first function that the driver lacks. */
EPD_MUST_CHECK enum epd_status cuda_driver_load(struct cuda_driver *driver, struct epd_error *error);

/* EPD_OK, or what kernels/cuda/error.h says, with "<what>: <CUDA's text>". */
EPD_MUST_CHECK enum epd_status cuda_driver_check(const struct cuda_driver *driver, CUresult result,
                                                 const char *what, struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_runtime_check(cudaError_t result, const char *what,
                                                  struct epd_error *error);

#endif
