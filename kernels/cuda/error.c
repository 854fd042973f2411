#include "kernels/cuda/error.h"

#include <driver_types.h>

enum epd_status cuda_error_status(int code)
{
    switch (code) {
    case cudaSuccess:
        return EPD_OK;
    case cudaErrorMemoryAllocation:
        return EPD_NO_MEMORY;
    case cudaErrorOperatingSystem:
    case cudaErrorNotPermitted:
        return EPD_SYSTEM;
    case cudaErrorNotSupported:
    case cudaErrorPeerAccessUnsupported:
    case cudaErrorNoKernelImageForDevice:
        return EPD_UNSUPPORTED;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidDevice:
    case cudaErrorMapBufferObjectFailed:
    case cudaErrorAlreadyMapped:
    case cudaErrorNotMapped:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorIllegalState:
    case cudaErrorPeerAccessAlreadyEnabled:
    case cudaErrorPeerAccessNotEnabled:
    case cudaErrorHostMemoryAlreadyRegistered:
    case cudaErrorHostMemoryNotRegistered:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
        return EPD_INTERNAL;
    default:
        return EPD_CUDA;
    }
}
