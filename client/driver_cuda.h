/* The functions of the NVIDIA driver that libepd uses. It is opened when it is first needed: libepd links no CUDA. */
#ifndef EPD_CLIENT_DRIVER_CUDA_H
#define EPD_CLIENT_DRIVER_CUDA_H

#include <cuda.h>

#include "proto/status.h"

#define DRIVER_FUNCTIONS(X)                                                                                  \
    X(cuGetErrorString, "cuGetErrorString")                                                                  \
    X(cuCtxGetDevice, "cuCtxGetDevice")                                                                      \
    X(cuDeviceGetUuid, "cuDeviceGetUuid_v2")                                                                 \
    X(cuMemHostRegister, "cuMemHostRegister_v2")                                                             \
    X(cuMemHostUnregister, "cuMemHostUnregister")                                                            \
    X(cuMemHostGetDevicePointer, "cuMemHostGetDevicePointer_v2")                                             \
    X(cuStreamBatchMemOp, "cuStreamBatchMemOp_v2")                                                           \
    X(cuStreamIsCapturing, "cuStreamIsCapturing")                                                            \
    X(cuPointerGetAttribute, "cuPointerGetAttribute")                                                        \
    X(cuMemGetAddressRange, "cuMemGetAddressRange_v2")                                                       \
    X(cuIpcGetMemHandle, "cuIpcGetMemHandle")                                                                \
    X(cuMemRetainAllocationHandle, "cuMemRetainAllocationHandle")                                            \
    X(cuMemExportToShareableHandle, "cuMemExportToShareableHandle")                                          \
    X(cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle")                                      \
    X(cuMemGetAllocationPropertiesFromHandle, "cuMemGetAllocationPropertiesFromHandle")                      \
    X(cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity")                                        \
    X(cuMemRelease, "cuMemRelease")                                                                          \
    X(cuMemAddressReserve, "cuMemAddressReserve")                                                            \
    X(cuMemAddressFree, "cuMemAddressFree")                                                                  \
    X(cuMemMap, "cuMemMap")                                                                                  \
    X(cuMemUnmap, "cuMemUnmap")                                                                              \
    X(cuMemSetAccess, "cuMemSetAccess")                                                                      \
    X(cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2")                                                             \
    X(cuMemcpyDtoD, "cuMemcpyDtoD_v2")                                                                       \
    X(cuStreamSynchronize, "cuStreamSynchronize")                                                            \
    X(cuLibraryLoadData, "cuLibraryLoadData")                                                                \
    X(cuLibraryGetKernel, "cuLibraryGetKernel")                                                              \
    X(cuKernelGetFunction, "cuKernelGetFunction")                                                            \
    X(cuLaunchKernel, "cuLaunchKernel")                                                                      \
    X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode")

#define DRIVER_POINTER(name, symbol) __typeof__(name) *name;
struct driver {
    DRIVER_FUNCTIONS(DRIVER_POINTER)
};
#undef DRIVER_POINTER

/* Any thread. EPD_UNSUPPORTED, with what is missing, where there is no driver or one that is too old. */
EPD_MUST_CHECK enum epd_status driver_check(struct epd_error *error);
/* The functions. Any thread, once driver_check has returned EPD_OK. */
const struct driver *driver(void);
/* What a function has returned, as a status: `what` is said before the driver's own words. */
EPD_MUST_CHECK enum epd_status driver_result(CUresult result, const char *what, struct epd_error *error);

#endif
